// A zip archive that stores its files as they are: PNG is compressed already.

const MOST = 0xffff; // files, and
const LARGEST = 0xffffffff; // bytes, of an archive without the extensions of Zip64

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit += 1) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  return crc;
});

function crc32(bytes) {
  let crc = -1;
  for (let i = 0; i < bytes.length; i += 1) crc = (crc >>> 8) ^ TABLE[(crc ^ bytes[i]) & 255];
  return (crc ^ -1) >>> 0;
}

/** A blob of [path, blob] pairs, which are read one after the other: never all at once in memory. */
export async function zip(files) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const [name, blob] of files) {
    const path = new TextEncoder().encode(name);
    const fields = new DataView(new ArrayBuffer(26)); // what both kinds of header share
    fields.setUint16(0, 20, true); // version needed
    fields.setUint16(2, 0x0800, true); // names are UTF-8
    fields.setUint16(8, 0x21, true); // 1980-01-01: masks have no time of their own
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
  if (files.length > MOST || offset + size > LARGEST) throw new Error("This is too much for one zip archive.");
  const end = new DataView(new ArrayBuffer(22));
  end.setUint32(0, 0x06054b50, true);
  end.setUint16(8, files.length, true);
  end.setUint16(10, files.length, true);
  end.setUint32(12, size, true);
  end.setUint32(16, offset, true);
  return new Blob([...parts, ...directory, end.buffer], { type: "application/zip" });
}
