// Writes zip archives without compression, because PNG is compressed already.

const MAX_FILES = 0xffff; // limits of the format without its Zip64 extension
const MAX_BYTES = 0xffffffff;

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit += 1) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  return crc;
});

function crc32(bytes) {
  let crc = -1;
  for (let i = 0; i < bytes.length; i += 1) crc = (crc >>> 8) ^ CRC_TABLE[(crc ^ bytes[i]) & 255];
  return (crc ^ -1) >>> 0;
}

/** A zip archive of [path, blob] pairs. Blobs are read one by one, never all into memory at once. */
export async function zip(files) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const [name, blob] of files) {
    const path = new TextEncoder().encode(name);
    const fields = new DataView(new ArrayBuffer(26)); // common to the local and the central header
    fields.setUint16(0, 20, true); // version needed
    fields.setUint16(2, 0x0800, true); // names are UTF-8
    fields.setUint16(8, 0x21, true); // 1980-01-01, the earliest date
    fields.setUint32(10, crc32(new Uint8Array(await blob.arrayBuffer())), true);
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
  end.setUint32(0, 0x06054b50, true);
  end.setUint16(8, files.length, true);
  end.setUint16(10, files.length, true);
  end.setUint32(12, size, true);
  end.setUint32(16, offset, true);
  return new Blob([...parts, ...directory, end.buffer], { type: "application/zip" });
}
