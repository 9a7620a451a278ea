// Decodes files and draws thumbnails, on the page or in a worker. Knows neither the queue nor the page.

const TINT = [255, 64, 129]; // the service's overlays use the same color

const UNSUPPORTED = "Your browser cannot show this format. The server drew it as the model sees it.";
const SIXTEEN_BIT = "Browsers show only 8 of 16 bits. The server drew this image as the model sees it.";
export const TURNED = "Browsers differ in how they turn this image. The server drew it as the model sees it.";

/** {image, reason}: a bitmap, or null and the reason why the browser cannot show the file. */
export async function decode(file) {
  if (await isSixteenBitPng(file)) return { image: null, reason: SIXTEEN_BIT };
  if (await isTurned(file)) return { image: null, reason: TURNED };
  try {
    return { image: await createImageBitmap(file), reason: "" }; // applies the EXIF orientation
  } catch {
    return { image: null, reason: UNSUPPORTED };
  }
}

/** Browsers show the upper 8 bits of a 16-bit PNG. An image of a 12-bit camera is nearly black then. */
async function isSixteenBitPng(file) {
  try {
    const head = new Uint8Array(await file.slice(0, 25).arrayBuffer());
    return head[0] === 0x89 && head[1] === 0x50 && head[24] === 16; // byte 24: bit depth in IHDR
  } catch {
    return false;
  }
}

const EXIF = /(?:eXIf|EXIF[^]{4})(?:Exif\0\0)?(?=II\*\0|MM\0\*)/; // the chunk of a PNG or WebP, up to its TIFF header
const ORIENTATION = 0x0112; // its tag

/** Whether a PNG or WebP says that it is to be turned. Browsers agree about JPEGs alone. */
async function isTurned(file) {
  try {
    const head = new TextDecoder("latin1").decode(await file.slice(0, 12).arrayBuffer());
    if (!/^.PNG|^RIFF[^]{4}WEBP/.test(head)) return false;
    const bytes = await file.arrayBuffer();
    const found = EXIF.exec(new TextDecoder("latin1").decode(bytes));
    return Boolean(found) && readOrientation(new DataView(bytes, found.index + found[0].length)) > 1;
  } catch {
    return false; // damaged metadata
  }
}

/** The orientation in the first directory of a TIFF header; 1 is upright. */
function readOrientation(tiff) {
  const little = tiff.getUint8(0) === 0x49;
  const directory = tiff.getUint32(4, little);
  const count = tiff.getUint16(directory, little);
  for (let at = directory + 2; at < directory + 2 + 12 * count; at += 12) {
    if (tiff.getUint16(at, little) === ORIENTATION) return tiff.getUint16(at + 8, little);
  }
  return 1;
}

export function createCanvas(width, height) {
  if (typeof document === "undefined") return new OffscreenCanvas(width, height);
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

/** Free the memory of bitmaps and canvases now; the garbage collector does not know their size. */
export function release(...sources) {
  for (const source of sources) {
    if (source?.close) source.close();
    else if (source) source.width = source.height = 0;
  }
}

/** A canvas as something that a worker can send: its pixels. On the page it stays a canvas. */
const toPicture = (canvas) => canvas.transferToImageBitmap?.() ?? canvas;

/** The image, and copies of half the size each down to about a screen: scaling a large one takes long. */
export function createPyramid(image) {
  const levels = [image];
  for (let last = image; Math.min(last.width, last.height) > 1400; last = levels.at(-1)) {
    const half = createCanvas(Math.ceil(last.width / 2), Math.ceil(last.height / 2));
    half.getContext("2d").drawImage(last, 0, 0, half.width, half.height);
    levels.push(toPicture(half));
  }
  return levels;
}

/** The image with the values between its 0.5 and 99.5 percentiles spread to black and white. */
export function stretchContrast(image) {
  const canvas = createCanvas(image.width, image.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, image.width, image.height);
  const { data } = pixels;
  const histogram = new Uint32Array(256);
  for (let i = 0; i < data.length; i += 4) histogram[Math.max(data[i], data[i + 1], data[i + 2])] += 1;
  const percentile = (share) => {
    let seen = 0;
    return histogram.findIndex((count) => (seen += count) >= (share * data.length) / 4);
  };
  const [low, high] = [percentile(0.005), percentile(0.995)];
  const stretched = Uint8ClampedArray.from({ length: 256 }, (_, value) => (255 * (value - low)) / Math.max(1, high - low));
  for (let i = 0; i < data.length; i += 4) {
    for (let c = 0; c < 3; c += 1) data[i + c] = stretched[data[i + c]];
  }
  context.putImageData(pixels, 0, 0);
  return toPicture(canvas);
}

/** The central square of a picture, `side` pixels wide. */
export function cropSquare(image, side) {
  const canvas = createCanvas(side, side);
  canvas.getContext("2d").drawImage(image, ...centralSquare(image), 0, 0, side, side);
  return toPicture(canvas);
}

/** The central square of a mask, transparent where the mask is black. Colors of classes stay as they are. */
export function tintMask(mask, side) {
  const canvas = createCanvas(side, side);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(mask, ...centralSquare(mask), 0, 0, side, side);
  const pixels = context.getImageData(0, 0, side, side);
  const { data } = pixels;
  for (let i = 0; i < data.length; i += 4) {
    if (data[i] + data[i + 1] + data[i + 2] < 96) data[i + 3] = 0;
    else if (data[i] === data[i + 1] && data[i] === data[i + 2]) data.set(TINT, i);
  }
  context.putImageData(pixels, 0, 0);
  return toPicture(canvas);
}

/** Draw a square picture, and the tint of a mask over it. Either may be missing. */
export function drawThumbnail(canvas, picture, tint = null) {
  const context = canvas.getContext("2d");
  if (picture) {
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(picture, 0, 0);
  }
  if (!tint) return;
  context.globalAlpha = 0.4;
  context.drawImage(tint, 0, 0);
  context.globalAlpha = 1;
}

function centralSquare({ width, height }) {
  const side = Math.min(width, height);
  return [(width - side) / 2, (height - side) / 2, side, side];
}

export const sameSize = (a, b) => a.width === b.width && a.height === b.height;
