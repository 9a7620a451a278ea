// Reads and writes the PNGs of the service: masks, label maps, probabilities and cutouts. A canvas would
// reduce 16 bits to 8, and would turn a grey mask into RGBA.

import { crc32 } from "./zip.js";

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const [NONE, UP, AVERAGE, PAETH] = [0, 2, 3, 4]; // filters of rows
const HEADER_BYTES = 33; // of the signature and the first chunk
const SAMPLES = { 0: 1, 2: 3, 3: 1, 4: 2, 6: 4 }; // per pixel, by color type

/**
 * {width, height, depth, color, palette, data} of a PNG of 8 or 16 bits that is not interlaced.
 * `data` has the samples, as Uint8Array or Uint16Array; `palette` the bytes of the PLTE chunk or null.
 */
export async function readPng(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  if (bytes.length < HEADER_BYTES) throw new Error("An unexpected kind of PNG");
  const view = new DataView(bytes.buffer);
  const png = { width: view.getUint32(16), height: view.getUint32(20), depth: bytes[24], color: bytes[25], palette: null };
  if (view.getUint32(0) !== 0x89504e47 || png.depth < 8 || bytes[28]) throw new Error("An unexpected kind of PNG");
  const parts = [];
  for (let at = 8; at + 8 <= bytes.length; at += 12 + view.getUint32(at)) {
    const type = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const content = bytes.subarray(at + 8, at + 8 + view.getUint32(at));
    if (type === "IDAT") parts.push(content);
    if (type === "PLTE") png.palette = content.slice();
  }
  const inflated = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate"));
  const filtered = new Uint8Array(await new Response(inflated).arrayBuffer());
  const pixelBytes = (SAMPLES[png.color] * png.depth) / 8;
  const raw = unfilter(filtered, png.width * pixelBytes, png.height, pixelBytes);
  png.data = png.depth === 16 ? toUint16(raw) : raw;
  return png;
}

/** Undo the filters of PNG (section 9 of its specification). */
function unfilter(filtered, rowBytes, height, pixelBytes) {
  const out = new Uint8Array(rowBytes * height);
  for (let y = 0; y < height; y += 1) {
    const from = y * (rowBytes + 1) + 1;
    const to = y * rowBytes;
    const filter = filtered[from - 1];
    if (filter === NONE) {
      out.set(filtered.subarray(from, from + rowBytes), to);
      continue;
    }
    for (let x = 0; x < rowBytes; x += 1) {
      const left = x < pixelBytes ? 0 : out[to + x - pixelBytes];
      const up = y ? out[to + x - rowBytes] : 0;
      let predicted = left;
      if (filter === UP) predicted = up;
      else if (filter === AVERAGE) predicted = (left + up) >> 1;
      else if (filter === PAETH) predicted = paeth(left, up, y && x >= pixelBytes ? out[to + x - rowBytes - pixelBytes] : 0);
      out[to + x] = filtered[from + x] + predicted;
    }
  }
  return out;
}

function paeth(left, up, corner) {
  const [a, b, c] = [Math.abs(up - corner), Math.abs(left - corner), Math.abs(left + up - 2 * corner)];
  if (a <= b && a <= c) return left;
  return b <= c ? up : corner;
}

function toUint16(raw) {
  const values = new Uint16Array(raw.length / 2);
  for (let i = 0; i < values.length; i += 1) values[i] = (raw[2 * i] << 8) | raw[2 * i + 1];
  return values;
}

function toBytes(samples) {
  const bytes = new Uint8Array(2 * samples.length);
  for (let i = 0; i < samples.length; i += 1) {
    bytes[2 * i] = samples[i] >> 8;
    bytes[2 * i + 1] = samples[i];
  }
  return bytes;
}

/** Each row as its differences to the row above, which deflate compresses well. */
function filterRows(bytes, rowBytes, height) {
  const filtered = new Uint8Array((rowBytes + 1) * height);
  for (let y = 0, from = 0, to = 0; y < height; y += 1) {
    filtered[to] = UP;
    to += 1;
    for (let x = 0; x < rowBytes; x += 1, from += 1, to += 1) {
      filtered[to] = bytes[from] - (y ? bytes[from - rowBytes] : 0);
    }
  }
  return filtered;
}

/** A PNG with the samples `data`; the other fields are those of `readPng`. */
export async function writePng({ width, height, depth, color, palette = null, data }) {
  const rowBytes = (width * SAMPLES[color] * depth) / 8;
  const filtered = filterRows(depth === 8 ? data : toBytes(data), rowBytes, height);
  const deflated = new Blob([filtered]).stream().pipeThrough(new CompressionStream("deflate"));
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, depth);
  header.setUint8(9, color);
  const parts = [new Uint8Array(SIGNATURE), chunk("IHDR", new Uint8Array(header.buffer))];
  if (palette) parts.push(chunk("PLTE", palette));
  parts.push(chunk("IDAT", new Uint8Array(await new Response(deflated).arrayBuffer())), chunk("IEND", new Uint8Array()));
  return new Blob(parts, { type: "image/png" });
}

function chunk(type, content) {
  const bytes = new Uint8Array(12 + content.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  bytes.set(new TextEncoder().encode(type), 4);
  bytes.set(content, 8);
  view.setUint32(8 + content.length, crc32(bytes.subarray(4, 8 + content.length)));
  return bytes;
}
