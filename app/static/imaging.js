// Decodes files and paints masks. Knows neither the queue nor the page.

const TINT = [255, 64, 129]; // the service's overlays use the same colour

export const UNSUPPORTED = "Your browser cannot show this format. The server drew it.";
export const SIXTEEN_BIT = "Browsers show only 8 of 16 bits. The server drew this image over its full range.";
export const ROTATED = "Your browser ignores the orientation of this image. The server drew it.";

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

/** The image under an overlay of the service, which is (image + TINT) / 2 where the mask is set. */
export function removeTint(overlay, mask) {
  const { width, height } = mask;
  const [overlayContext, maskContext] = [overlay, mask].map((source) => {
    const context = createCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.drawImage(source, 0, 0);
    return context;
  });
  const pixels = overlayContext.getImageData(0, 0, width, height);
  const inside = maskContext.getImageData(0, 0, width, height).data;
  for (let i = 0; i < inside.length; i += 4) {
    if (!inside[i] && !inside[i + 1] && !inside[i + 2]) continue;
    // The division dropped the lowest bit, so a value may be 1 too low. ImageData clamps to 0..255.
    for (let c = 0; c < 3; c += 1) pixels.data[i + c] = 2 * pixels.data[i + c] - TINT[c];
  }
  overlayContext.putImageData(pixels, 0, 0);
  release(maskContext.canvas);
  return overlayContext.canvas;
}

/** {area, outline}: canvases with the mask and its outline in colour, transparent elsewhere. */
export function paint(mask) {
  const { width, height } = mask;
  const area = createCanvas(width, height);
  const context = area.getContext("2d", { willReadFrequently: true });
  context.drawImage(mask, 0, 0);
  const pixels = context.getImageData(0, 0, width, height);
  const edges = context.createImageData(width, height);
  const { data } = pixels;
  // Masks are opaque. A canvas beyond the browser's limits raises no error, but stays transparent.
  if (!data[3]) throw new Error(`The browser cannot create a canvas of ${width} × ${height}`);
  const inside = new Uint8Array(width * height);
  for (let i = 0; i < inside.length; i += 1) {
    inside[i] = data[4 * i] || data[4 * i + 1] || data[4 * i + 2] ? 1 : 0;
  }
  for (let y = 0, i = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1, i += 1) {
      const j = 4 * i;
      if (!inside[i]) {
        data[j + 3] = 0;
        continue;
      }
      // Masks of one class are white and get the tint. Masks of several classes keep their palette.
      if (data[j] === 255 && data[j + 1] === 255 && data[j + 2] === 255) data.set(TINT, j);
      const interior =
        x > 0 && x < width - 1 && y > 0 && y < height - 1 &&
        inside[i - 1] && inside[i + 1] && inside[i - width] && inside[i + width];
      if (!interior) edges.data.set(data.subarray(j, j + 4), j);
    }
  }
  context.putImageData(pixels, 0, 0);
  const outline = createCanvas(width, height);
  outline.getContext("2d").putImageData(edges, 0, 0);
  return { area, outline };
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
  small.getContext("2d").drawImage(mask, ...centralSquare(mask), 0, 0, small.width, small.height);
  const { area, outline } = paint(small);
  const context = canvas.getContext("2d");
  context.globalAlpha = 0.5;
  context.drawImage(area, 0, 0);
  release(small, area, outline);
}

function centralSquare({ width, height }) {
  const side = Math.min(width, height);
  return [(width - side) / 2, (height - side) / 2, side, side];
}

export const sameSize = (a, b) => a.width === b.width && a.height === b.height;
