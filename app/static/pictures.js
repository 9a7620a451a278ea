// Pixels: files decoded, masks painted. Knows no items and no page.

const TINT = [255, 64, 129]; // of the service's overlays, too

export const FOREIGN = "Your browser cannot show this format; the service drew it.";
export const DEEP = "Of 16 bits a browser shows the upper 8; the service drew this, over the range there is.";
export const TURNED = "Your browser does not turn this format upright; the service drew it.";

/** {picture, why}: a bitmap, or null and why the service has to draw it. */
export async function decode(file) {
  if (await isDeep(file)) return { picture: null, why: DEEP };
  try {
    return { picture: await createImageBitmap(file), why: "" }; // upright, as EXIF says
  } catch {
    return { picture: null, why: FOREIGN };
  }
}

/** Whether a file is a PNG of 16 bits: cameras of 12 leave the upper 8 nearly black. */
async function isDeep(file) {
  try {
    const head = new Uint8Array(await file.slice(0, 25).arrayBuffer());
    return head[0] === 0x89 && head[1] === 0x50 && head[24] === 16; // the depth in IHDR
  } catch {
    return false;
  }
}

export function canvasOf(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

/** Give the memory of bitmaps and canvases back now; the collector does not know how large they are. */
export function release(...sources) {
  for (const source of sources) {
    if (source instanceof HTMLCanvasElement) source.width = source.height = 0;
    else source?.close();
  }
}

/** The image under an overlay of the service, which is (image + TINT) / 2 inside the mask. */
export function untinted(overlay, mask) {
  const { width, height } = mask;
  const [below, above] = [overlay, mask].map((source) => {
    const context = canvasOf(width, height).getContext("2d", { willReadFrequently: true });
    context.drawImage(source, 0, 0);
    return context;
  });
  const pixels = below.getImageData(0, 0, width, height);
  const inside = above.getImageData(0, 0, width, height).data;
  for (let i = 0; i < inside.length; i += 4) {
    if (!inside[i] && !inside[i + 1] && !inside[i + 2]) continue;
    // what the halving cut off is lost: the result is as it was, or one less. Bytes are clamped.
    for (let c = 0; c < 3; c += 1) pixels.data[i + c] = 2 * pixels.data[i + c] - TINT[c];
  }
  below.putImageData(pixels, 0, 0);
  release(above.canvas);
  return below.canvas;
}

/** Two layers from a mask: its area and its outline, coloured, transparent elsewhere. */
export function paint(mask) {
  const { width, height } = mask;
  const area = canvasOf(width, height);
  const context = area.getContext("2d", { willReadFrequently: true });
  context.drawImage(mask, 0, 0);
  const pixels = context.getImageData(0, 0, width, height);
  const edges = context.createImageData(width, height);
  const { data } = pixels;
  // masks are opaque; a canvas beyond the browser's limits takes all that is drawn and stays empty
  if (!data[3]) throw new Error(`no canvas of ${width} × ${height} here`);
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
      // black and white masks get our colour, class masks keep their palette's
      if (data[j] === 255 && data[j + 1] === 255 && data[j + 2] === 255) data.set(TINT, j);
      const inner =
        x > 0 && x < width - 1 && y > 0 && y < height - 1 &&
        inside[i - 1] && inside[i + 1] && inside[i - width] && inside[i + width];
      if (!inner) edges.data.set(data.subarray(j, j + 4), j);
    }
  }
  context.putImageData(pixels, 0, 0);
  const outline = canvasOf(width, height);
  outline.getContext("2d").putImageData(edges, 0, 0);
  return { area, outline };
}

/** A square of the middle of a picture, scaled once. */
export function thumbnail(canvas, picture) {
  const side = Math.min(picture.width, picture.height);
  const context = canvas.getContext("2d");
  context.globalAlpha = 1;
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture, ...middle(picture, side), 0, 0, canvas.width, canvas.height);
}

/** The mask over it. It is scaled first and painted then: a few thousand pixels instead of millions. */
export function thumbnailMask(canvas, mask) {
  const side = Math.min(mask.width, mask.height);
  const small = canvasOf(canvas.width, canvas.height);
  small.getContext("2d").drawImage(mask, ...middle(mask, side), 0, 0, small.width, small.height);
  const { area, outline } = paint(small);
  const context = canvas.getContext("2d");
  context.globalAlpha = 0.5;
  context.drawImage(area, 0, 0);
  release(small, area, outline);
}

const middle = ({ width, height }, side) => [(width - side) / 2, (height - side) / 2, side, side];

export const sameSize = (a, b) => a.width === b.width && a.height === b.height;
