import { crc32 } from 'node:zlib';
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { type Crc32, joinCrcs } from '../../core/crc.ts';

/** Bit by bit, as the CRC is defined. */
function crcOf(algorithm: Crc32, bytes: Uint8Array): string {
  const polynomial = algorithm === 'CRC32' ? 0xedb88320 : 0x82f63b78;
  let crc = 0xffffffff;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ polynomial : crc >>> 1;
  }
  return base64(~crc >>> 0);
}

function base64(crc: number): string {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(crc);
  return bytes.toString('base64');
}

const bytes = fc.uint8Array({ maxLength: 200 });

it.each(['CRC32', 'CRC32C'] as const)('the %s of the parts is that of the whole', (algorithm) => {
  fc.assert(
    fc.property(fc.array(bytes, { minLength: 1, maxLength: 5 }), (parts) => {
      const joined = joinCrcs(
        algorithm,
        parts.map((part) => ({ crc: crcOf(algorithm, part), size: part.length })),
      );
      expect(joined).toBe(crcOf(algorithm, Buffer.concat(parts)));
    }),
  );
});

it('parts of more bytes than 32 bits count are joined', () => {
  // 5 GiB of zeros, taken 64 MiB at a time, as zlib has it.
  const zeros = Buffer.alloc(64 * 2 ** 20);
  let whole = 0;
  for (let at = 0; at < 80; at++) whole = crc32(zeros, whole);
  const tail = Buffer.from('the last part');
  const joined = joinCrcs('CRC32', [
    { crc: base64(crc32(tail)), size: tail.length },
    { crc: base64(whole), size: 5 * 2 ** 30 },
  ]);
  let expected = crc32(tail);
  for (let at = 0; at < 80; at++) expected = crc32(zeros, expected);
  expect(joined).toBe(base64(expected));
});

it('what is no CRC of 32 bits is refused', () => {
  expect(() => joinCrcs('CRC32', [{ crc: 'AAAAAAAAAAA=', size: 1 }])).toThrow(RangeError);
});
