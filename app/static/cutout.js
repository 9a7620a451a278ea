// An image without its background, as the service's `cutout`. Knows neither the page nor the service.

import { createCanvas, release } from "./imaging.js";

const EDGE = 2; // rows and columns on either side of the border of the mask, where the opacity is soft
const TILE = 2048; // pixels; a canvas as large as the image may exceed the browser's limits

/**
 * Red, green, blue and opacity of all pixels; nothing of the image is left where it is transparent.
 *
 * @param image a bitmap
 * @param alpha of `softenEdge`
 */
export function cutOut(image, alpha) {
  const { width, height } = image;
  const rgba = new Uint8Array(4 * width * height);
  const tile = createCanvas(Math.min(TILE, width), Math.min(TILE, height));
  const context = tile.getContext("2d", { alpha: false, willReadFrequently: true }); // transparent parts are black
  for (let top = 0; top < height; top += TILE) {
    for (let left = 0; left < width; left += TILE) {
      const [columns, rows] = [Math.min(TILE, width - left), Math.min(TILE, height - top)];
      context.fillRect(0, 0, columns, rows);
      context.drawImage(image, left, top, columns, rows, 0, 0, columns, rows);
      const { data } = context.getImageData(0, 0, columns, rows);
      for (let y = 0, from = 0; y < rows; y += 1) {
        for (let x = 0, i = (top + y) * width + left; x < columns; x += 1, i += 1, from += 4) {
          if (!alpha[i]) continue;
          for (let c = 0; c < 3; c += 1) rgba[4 * i + c] = data[from + c];
          rgba[4 * i + 3] = alpha[i];
        }
      }
    }
  }
  release(tile);
  return rgba;
}

/**
 * The opacity of each pixel: 255 inside the mask and 0 outside.
 *
 * Within two pixels of the mask's border it is a ramp of two pixels. The ramp is at the place where the probability
 * equals the threshold, between pixels: their distance to it is the margin over the slope of the probability.
 *
 * @param mask samples, 0 outside
 * @param probability samples, 0 to 65535
 * @param threshold of the probability, 0 to 1
 */
export function softenEdge(mask, probability, width, height, threshold) {
  const alpha = Uint8Array.from(mask, (value) => (value ? 255 : 0));
  const around = findSides(mask, width, height);
  for (let y = 0, i = 0; y < height; y += 1) {
    const above = y ? width : 0;
    const below = y < height - 1 ? width : 0;
    for (let x = 0; x < width; x += 1, i += 1) {
      let sides = 0;
      for (let row = Math.max(0, y - EDGE); row <= Math.min(height - 1, y + EDGE); row += 1) sides |= around[row * width + x];
      if (sides !== BOTH) continue;
      const before = x ? 1 : 0;
      const after = x < width - 1 ? 1 : 0;
      const across = (probability[i + after] - probability[i - before]) / Math.max(1, before + after);
      const down = (probability[i + below] - probability[i - above]) / (above && below ? 2 : 1);
      const distance = (probability[i] / 65535 - threshold) / Math.max(Math.hypot(across, down) / 65535, 1e-6);
      // parts that were removed from the mask have a positive margin as well
      const clamped = mask[i] ? Math.max(0, distance) : Math.min(0, distance);
      alpha[i] = Math.round(255 * Math.min(1, Math.max(0, (clamped + 1) / 2)));
    }
  }
  return alpha;
}

const [INSIDE, OUTSIDE, BOTH] = [1, 2, 3];

/** Which sides of the mask's border are within two columns of each pixel. */
function findSides(mask, width, height) {
  const sides = new Uint8Array(mask.length);
  for (let y = 0, i = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1, i += 1) {
      const last = i + Math.min(EDGE, width - 1 - x);
      for (let j = i - Math.min(EDGE, x); j <= last; j += 1) sides[i] |= mask[j] ? INSIDE : OUTSIDE;
    }
  }
  return sides;
}
