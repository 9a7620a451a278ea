// Paints objects and masks for the pixels of a view. The work depends on the size of the view alone, not on
// that of the image, so that filters, colors and thresholds change at once. Knows no canvas and no page.
//
// A view is {x, y, scale}: the point of the image at the upper left corner, and view pixels per image pixel.

const opaque = (red, green, blue) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0; // little-endian RGBA
export const WHITE = opaque(255, 255, 255);
export const BLACK = opaque(0, 0, 0);

export function parseColor(text) {
  const value = Number.parseInt(text.slice(1), 16);
  return opaque(value >> 16, (value >> 8) & 255, value & 255);
}

/** Colors that differ between neighbors: hues by the golden angle, three levels of lightness. */
export function colorOf(label) {
  const hue = (label * 137.508) % 360;
  const lightness = [0.66, 0.57, 0.76][label % 3];
  const chroma = 0.95 * Math.min(lightness, 1 - lightness);
  const channel = (n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (lightness - chroma * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return opaque(channel(0), channel(8), channel(4));
}

/**
 * The value of `source` at each pixel of a view, 0 outside the image.
 *
 * @param source values of the image's pixels
 * @param cutoff if given, the result is 1 where the value is at least this, and 0 elsewhere
 */
export function sampleView(source, width, height, view, viewWidth, viewHeight, cutoff = null) {
  const sampled = new Uint32Array(viewWidth * viewHeight);
  const columns = Int32Array.from({ length: viewWidth }, (_, i) => Math.floor(view.x + (i + 0.5) / view.scale));
  let from = 0;
  while (from < viewWidth && columns[from] < 0) from += 1;
  let to = viewWidth;
  while (to > from && columns[to - 1] >= width) to -= 1;
  for (let j = 0; j < viewHeight; j += 1) {
    const y = Math.floor(view.y + (j + 0.5) / view.scale);
    if (y < 0 || y >= height) continue;
    const row = y * width;
    const out = j * viewWidth;
    if (cutoff === null) for (let i = from; i < to; i += 1) sampled[out + i] = source[row + columns[i]];
    else for (let i = from; i < to; i += 1) sampled[out + i] = source[row + columns[i]] >= cutoff ? 1 : 0;
  }
  return sampled;
}

/**
 * RGBA pixels, as Uint32Array, of sampled labels.
 *
 * @param fill color by label; 0 is transparent
 * @param edge color of the outline by label; 0 is none
 * @param thickness of outlines in view pixels; they are inside the objects
 */
export function paintLabels(sampled, viewWidth, viewHeight, fill, edge, thickness, out) {
  for (let j = 0, at = 0; j < viewHeight; j += 1) {
    const up = j >= thickness ? -thickness * viewWidth : 0;
    const down = j + thickness < viewHeight ? thickness * viewWidth : 0;
    for (let i = 0; i < viewWidth; i += 1, at += 1) {
      const label = sampled[at];
      const color = edge[label];
      if (!color) {
        out[at] = fill[label];
        continue;
      }
      const left = i >= thickness ? at - thickness : at;
      const right = i + thickness < viewWidth ? at + thickness : at;
      const border =
        sampled[left] !== label || sampled[right] !== label || sampled[at + up] !== label || sampled[at + down] !== label;
      out[at] = border ? color : fill[label];
    }
  }
  return out;
}
