/**
 * CRCs of a whole from the CRCs of its parts, without the bytes: how parts that S3 has checksummed are held against a
 * checksum of the whole object. The algebra is that of zlib's crc32_combine: appending n bytes multiplies by x^(8n)
 * modulo the polynomial.
 */

/** Polynomials, bit-reversed, of the 32-bit CRCs that S3 keeps. */
const POLYNOMIALS = { CRC32: 0xedb88320, CRC32C: 0x82f63b78 } as const;
export type Crc32 = keyof typeof POLYNOMIALS;

export interface CrcPart {
  /** Base64, as S3 gives it. */
  crc: string;
  /** Bytes. */
  size: number;
}

/** The CRC of parts one after the other, in base64. */
export function joinCrcs(algorithm: Crc32, parts: readonly CrcPart[]): string {
  const polynomial = POLYNOMIALS[algorithm];
  let joined = 0;
  for (const { crc, size } of parts) {
    joined = (multiply(powerOfX(size, polynomial), joined, polynomial) ^ bits(crc)) >>> 0;
  }
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(joined);
  return bytes.toString('base64');
}

function bits(crc: string): number {
  const bytes = Buffer.from(crc, 'base64');
  if (bytes.length !== 4) throw new RangeError(`${crc} is not a CRC of 32 bits`);
  return bytes.readUInt32BE();
}

/** a × b modulo the polynomial; the highest bit is x^0. */
function multiply(a: number, b: number, polynomial: number): number {
  let product = 0;
  let factor = b;
  for (let bit = 31; bit >= 0; bit--) {
    if ((a >>> bit) & 1) product ^= factor;
    factor = factor & 1 ? (factor >>> 1) ^ polynomial : factor >>> 1;
  }
  return product >>> 0;
}

/** x^(8 × bytes) modulo the polynomial. */
function powerOfX(bytes: number, polynomial: number): number {
  let power = 0x80000000;
  let square = 0x00800000;
  for (let rest = bytes; rest > 0; rest = Math.floor(rest / 2)) {
    if (rest % 2 === 1) power = multiply(square, power, polynomial);
    square = multiply(square, square, polynomial);
  }
  return power;
}
