/**
 * The checksums S3 knows, fast enough for slides of many gigabytes, and the arithmetic that joins the checksums
 * of parts into that of the whole object without reading it again.
 *
 * CRC-64/NVME and CRC-32C are not in Node: both are computed eight bytes a step from eight tables of 32-bit
 * halves ("slicing by 8", Kounavis and Berry, 2005), read as aligned little-endian words.
 */
import { createHash, type Hash } from 'node:crypto';
import { crc32 } from 'node:zlib';

export const ALGORITHMS = ['CRC32', 'CRC32C', 'CRC64NVME', 'SHA1', 'SHA256'] as const;
export type Algorithm = (typeof ALGORITHMS)[number];

/** Whether a checksum is that of the bytes, or that of the parts' checksums (`<base64>-<parts>`). */
export type ChecksumType = 'FULL_OBJECT' | 'COMPOSITE';

export interface Checksum {
  algorithm: Algorithm;
  type: ChecksumType;
  /** Base64; with `-<parts>` appended when COMPOSITE. */
  value: string;
}

/** A running checksum; `digest` may be called once. */
export interface Digest {
  update(bytes: Uint8Array): unknown;
  digest(): Buffer;
}

/** Length in bytes of an algorithm's value. */
export const DIGEST_BYTES: Record<Algorithm, number> = {
  CRC32: 4,
  CRC32C: 4,
  CRC64NVME: 8,
  SHA1: 20,
  SHA256: 32,
};

export function createDigest(algorithm: Algorithm): Digest {
  switch (algorithm) {
    case 'CRC32':
      return new Crc32();
    case 'CRC32C':
      return new Crc32c();
    case 'CRC64NVME':
      return new Crc64Nvme();
    case 'SHA1':
      return createHash('sha1');
    case 'SHA256':
      return createHash('sha256');
  }
}

/** Everything asked of one stream of bytes: its MD5 and length, and any of the checksums. */
export class Digests {
  readonly #md5: Hash = createHash('md5');
  readonly #digests: Map<Algorithm, Digest>;
  size = 0;

  constructor(algorithms: Iterable<Algorithm>) {
    this.#digests = new Map([...algorithms].map((algorithm) => [algorithm, createDigest(algorithm)]));
  }

  update(bytes: Uint8Array): void {
    this.size += bytes.length;
    this.#md5.update(bytes);
    for (const digest of this.#digests.values()) digest.update(bytes);
  }

  digest(): { size: number; md5: Buffer; checksums: Map<Algorithm, Buffer> } {
    const checksums = new Map([...this.#digests].map(([algorithm, digest]) => [algorithm, digest.digest()]));
    return { size: this.size, md5: this.#md5.digest(), checksums };
  }
}

class Crc32 implements Digest {
  #crc = 0;
  update(bytes: Uint8Array): void {
    this.#crc = crc32(bytes, this.#crc);
  }
  digest(): Buffer {
    const out = Buffer.alloc(4);
    out.writeUInt32BE(this.#crc >>> 0);
    return out;
  }
}

/** Polynomials without their top bit, bits reversed. */
const CRC32_POLYNOMIAL = 0xedb88320n;
const CRC32C_POLYNOMIAL = 0x82f63b78n;
const CRC64NVME_POLYNOMIAL = 0x9a6c9329ac4bc9b5n;

/** Table s holds the effect of a byte that s further bytes follow; entry i is at `s × 512 + i × 2`, high half first. */
function slicingTables(polynomial: bigint): Int32Array {
  const tables = new Int32Array(8 * 512);
  const set = (at: number, crc: bigint) => {
    tables[at] = Number(BigInt.asIntN(32, crc >> 32n));
    tables[at + 1] = Number(BigInt.asIntN(32, crc));
  };
  const first: bigint[] = [];
  for (let byte = 0; byte < 256; byte++) {
    let crc = BigInt(byte);
    for (let bit = 0; bit < 8; bit++) crc = crc & 1n ? (crc >> 1n) ^ polynomial : crc >> 1n;
    first.push(crc);
  }
  for (let byte = 0; byte < 256; byte++) {
    let crc = first[byte] ?? 0n;
    for (let slice = 0; slice < 8; slice++) {
      set(slice * 512 + byte * 2, crc);
      crc = (crc >> 8n) ^ (first[Number(crc & 255n)] ?? 0n);
    }
  }
  return tables;
}

/**
 * A reflected CRC of up to 64 bits, all ones before and inverted after, as two 32-bit halves.
 * Narrower ones leave the high half at zero.
 */
class SlicedCrc {
  readonly #tables: Int32Array;
  #high: number;
  #low = -1;

  constructor(tables: Int32Array, high: number) {
    this.#tables = tables;
    this.#high = high;
  }

  update(bytes: Uint8Array): void {
    const aligned = Math.min(bytes.length, -bytes.byteOffset & 3);
    this.#bytes(bytes, 0, aligned);
    const pairs = (bytes.length - aligned) >>> 3;
    if (pairs > 0)
      this.#words(new Int32Array(bytes.buffer, bytes.byteOffset + aligned, pairs * 2), this.#tables);
    this.#bytes(bytes, aligned + pairs * 8, bytes.length);
  }

  /** The hot loop: all values stay 32-bit integers. `>>> 7` and `<< 1` make an index of a byte by two. */
  #words(words: Int32Array, t: Int32Array): void {
    let high = this.#high;
    let low = this.#low;
    for (let i = 0; i < words.length; i += 2) {
      const a = (words[i] as number) ^ low;
      const b = (words[i + 1] as number) ^ high;
      const i7 = 3584 + ((a << 1) & 510);
      const i6 = 3072 + ((a >>> 7) & 510);
      const i5 = 2560 + ((a >>> 15) & 510);
      const i4 = 2048 + ((a >>> 23) & 510);
      const i3 = 1536 + ((b << 1) & 510);
      const i2 = 1024 + ((b >>> 7) & 510);
      const i1 = 512 + ((b >>> 15) & 510);
      const i0 = (b >>> 23) & 510;
      high =
        (t[i7] as number) ^
        (t[i6] as number) ^
        (t[i5] as number) ^
        (t[i4] as number) ^
        (t[i3] as number) ^
        (t[i2] as number) ^
        (t[i1] as number) ^
        (t[i0] as number);
      low =
        (t[i7 + 1] as number) ^
        (t[i6 + 1] as number) ^
        (t[i5 + 1] as number) ^
        (t[i4 + 1] as number) ^
        (t[i3 + 1] as number) ^
        (t[i2 + 1] as number) ^
        (t[i1 + 1] as number) ^
        (t[i0 + 1] as number);
    }
    this.#high = high;
    this.#low = low;
  }

  #bytes(bytes: Uint8Array, start: number, end: number): void {
    const t = this.#tables;
    for (let i = start; i < end; i++) {
      const index = ((this.#low ^ (bytes[i] as number)) & 255) << 1;
      const low = (this.#low >>> 8) | (this.#high << 24);
      this.#high = (this.#high >>> 8) ^ (t[index] as number);
      this.#low = low ^ (t[index + 1] as number);
    }
  }

  /** High and low half, not yet inverted. */
  get state(): [number, number] {
    return [this.#high, this.#low];
  }
}

const crc64Tables = slicingTables(CRC64NVME_POLYNOMIAL);
const crc32cTables = slicingTables(CRC32C_POLYNOMIAL);

class Crc64Nvme extends SlicedCrc implements Digest {
  constructor() {
    super(crc64Tables, -1);
  }
  digest(): Buffer {
    const [high, low] = this.state;
    const out = Buffer.alloc(8);
    out.writeInt32BE(~high);
    out.writeInt32BE(~low, 4);
    return out;
  }
}

class Crc32c extends SlicedCrc implements Digest {
  constructor() {
    super(crc32cTables, 0);
  }
  digest(): Buffer {
    const out = Buffer.alloc(4);
    out.writeInt32BE(~this.state[1]);
    return out;
  }
}

type Crc = 'CRC32' | 'CRC32C' | 'CRC64NVME';

const FIELDS: Record<Crc, { polynomial: bigint; bits: bigint }> = {
  CRC32: { polynomial: CRC32_POLYNOMIAL, bits: 32n },
  CRC32C: { polynomial: CRC32C_POLYNOMIAL, bits: 32n },
  CRC64NVME: { polynomial: CRC64NVME_POLYNOMIAL, bits: 64n },
};

export const isCrc = (algorithm: Algorithm): algorithm is Crc => algorithm in FIELDS;

/**
 * The CRC of parts laid end to end, from their CRCs and lengths in bytes:
 * crc(a ‖ b) = crc(a) · x^(8·|b|) + crc(b) in the algorithm's field.
 */
export function joinCrcs(algorithm: Crc, parts: Iterable<{ crc: Buffer; size: number }>): Buffer {
  const { polynomial, bits } = FIELDS[algorithm];
  const one = 1n << (bits - 1n);
  const multiply = (a: bigint, b: bigint) => {
    let product = 0n;
    for (let rest = a, shifted = b; rest !== 0n; rest = BigInt.asUintN(Number(bits), rest << 1n)) {
      if (rest & one) product ^= shifted;
      shifted = shifted & 1n ? (shifted >> 1n) ^ polynomial : shifted >> 1n;
    }
    return product;
  };
  const powers = new Map<number, bigint>();
  const shift = (size: number) => {
    let power = powers.get(size);
    if (power === undefined) {
      power = one;
      let square = one >> 8n;
      for (let rest = BigInt(size); rest > 0n; rest >>= 1n) {
        if (rest & 1n) power = multiply(power, square);
        square = multiply(square, square);
      }
      powers.set(size, power);
    }
    return power;
  };
  let joined = 0n;
  for (const { crc, size } of parts)
    joined = multiply(joined, shift(size)) ^ BigInt(`0x${crc.toString('hex')}`);
  return Buffer.from(joined.toString(16).padStart(Number(bits / 4n), '0'), 'hex');
}
