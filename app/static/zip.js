// Writes zip archives without compression, because PNG is compressed already, and reads those of the service.

const MAX_FILES = 0xffff; // limits of the format without its Zip64 extension
const MAX_BYTES = 0xffffffff;
const LOCAL = 0x04034b50;
const CENTRAL = 0x02014b50;
const END = 0x06054b50;

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit += 1) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  return crc;
});

export function crc32(bytes) {
  let crc = -1;
  for (let i = 0; i < bytes.length; i += 1) crc = (crc >>> 8) ^ CRC_TABLE[(crc ^ bytes[i]) & 255];
  return (crc ^ -1) >>> 0;
}

const readChecksum = async (blob) => crc32(new Uint8Array(await blob.arrayBuffer()));

/** A zip archive of [path, blob] pairs, dated now. Blobs are read one by one, never all into memory at once. */
export async function zip(files, checksum = readChecksum) {
  const date = new Date();
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const [name, blob] of files) {
    const path = new TextEncoder().encode(name);
    const fields = new DataView(new ArrayBuffer(26)); // common to the local and the central header
    fields.setUint16(0, 20, true); // version needed
    fields.setUint16(2, 0x0800, true); // names are UTF-8
    // Times have steps of two seconds, years begin in 1980.
    fields.setUint16(6, (date.getHours() << 11) | (date.getMinutes() << 5) | (date.getSeconds() >> 1), true);
    fields.setUint16(8, ((date.getFullYear() - 1980) << 9) | ((date.getMonth() + 1) << 5) | date.getDate(), true);
    fields.setUint32(10, await checksum(blob), true);
    fields.setUint32(14, blob.size, true);
    fields.setUint32(18, blob.size, true);
    fields.setUint16(22, path.length, true);
    const entry = new DataView(new ArrayBuffer(14));
    entry.setUint32(10, offset, true);
    directory.push(new Uint8Array([0x50, 0x4b, 1, 2, 20, 0]), fields.buffer, entry.buffer, path);
    parts.push(new Uint8Array([0x50, 0x4b, 3, 4]), fields.buffer, path, blob);
    offset += 30 + path.length + blob.size;
  }
  const size = directory.reduce((sum, part) => sum + part.byteLength, 0);
  if (files.length > MAX_FILES || offset + size > MAX_BYTES) {
    throw new Error("Too large for one zip (limits: 4 GB and 65,535 files).");
  }
  const end = new DataView(new ArrayBuffer(22));
  end.setUint32(0, END, true);
  end.setUint16(8, files.length, true);
  end.setUint16(10, files.length, true);
  end.setUint32(12, size, true);
  end.setUint32(16, offset, true);
  return new Blob([...parts, ...directory, end.buffer], { type: "application/zip" });
}

const viewOf = async (blob) => new DataView(await blob.arrayBuffer());

/** The [path, blob] pairs of a zip archive without comment. Stored entries are not copied. */
export async function unzip(blob) {
  const end = await viewOf(blob.slice(-22));
  if (end.byteLength < 22 || end.getUint32(0, true) !== END) throw new Error("Unexpected response (a proxy?)");
  const directory = await viewOf(blob.slice(end.getUint32(16, true), end.getUint32(16, true) + end.getUint32(12, true)));
  const files = [];
  for (let at = 0; at < directory.byteLength && directory.getUint32(at, true) === CENTRAL; ) {
    const [method, size] = [directory.getUint16(at + 10, true), directory.getUint32(at + 20, true)];
    const [nameLength, extra, comment] = [28, 30, 32].map((field) => directory.getUint16(at + field, true));
    const path = new TextDecoder().decode(new Uint8Array(directory.buffer, at + 46, nameLength));
    const offset = directory.getUint32(at + 42, true);
    const local = await viewOf(blob.slice(offset, offset + 30));
    if (local.getUint32(0, true) !== LOCAL) throw new Error("A damaged zip");
    const start = offset + 30 + local.getUint16(26, true) + local.getUint16(28, true);
    const content = blob.slice(start, start + size);
    files.push([path, method === 0 ? content : await inflate(content)]);
    at += 46 + nameLength + extra + comment;
  }
  return files;
}

const inflate = (blob) => new Response(blob.stream().pipeThrough(new DecompressionStream("deflate-raw"))).blob();
