// Decodes files and draws thumbnails. Knows neither the queue nor the page.

const TINT = [255, 64, 129]; // the service's overlays use the same color

export const UNSUPPORTED = "Your browser cannot show this format. The server drew it as the model sees it.";
export const SIXTEEN_BIT = "Browsers show only 8 of 16 bits. The server drew this image as the model sees it.";
export const ROTATED = "Your browser ignores the orientation of this image. The server drew it as the model sees it.";

/** {image, reason}: a bitmap, or null and the reason why the browser cannot show the file. */
export async function decode(file) {
  if (await isSixteenBitPng(file)) return { image: null, reason: SIXTEEN_BIT };
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

export function createCanvas(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

/** Free the memory of bitmaps and canvases now; the garbage collector does not know their size. */
export function release(...sources) {
  for (const source of sources) {
    if (source instanceof HTMLCanvasElement) source.width = source.height = 0;
    else source?.close();
  }
}

/** The image, and copies of half the size each down to about a screen: scaling a large one takes long. */
export function createPyramid(image) {
  const levels = [image];
  for (let last = image; Math.min(last.width, last.height) > 1400; last = levels.at(-1)) {
    const half = createCanvas(Math.ceil(last.width / 2), Math.ceil(last.height / 2));
    half.getContext("2d").drawImage(last, 0, 0, half.width, half.height);
    levels.push(half);
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
  return canvas;
}

/** Draw the central square of an image, scaled to the canvas. */
export function drawThumbnail(canvas, image) {
  const context = canvas.getContext("2d");
  context.globalAlpha = 1;
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, ...centralSquare(image), 0, 0, canvas.width, canvas.height);
}

/** Draw the mask over a thumbnail. It is scaled before it is painted, because painting visits every pixel. */
export function drawThumbnailMask(canvas, mask) {
  const small = createCanvas(canvas.width, canvas.height);
  const context = small.getContext("2d", { willReadFrequently: true });
  context.drawImage(mask, ...centralSquare(mask), 0, 0, small.width, small.height);
  const pixels = context.getImageData(0, 0, small.width, small.height);
  const { data } = pixels;
  for (let i = 0; i < data.length; i += 4) {
    if (data[i] + data[i + 1] + data[i + 2] < 96) data[i + 3] = 0;
    else if (data[i] === data[i + 1] && data[i] === data[i + 2]) data.set(TINT, i);
  }
  context.putImageData(pixels, 0, 0);
  const target = canvas.getContext("2d");
  target.globalAlpha = 0.4;
  target.drawImage(small, 0, 0);
  target.globalAlpha = 1;
  release(small);
}

function centralSquare({ width, height }) {
  const side = Math.min(width, height);
  return [(width - side) / 2, (height - side) / 2, side, side];
}

export const sameSize = (a, b) => a.width === b.width && a.height === b.height;
