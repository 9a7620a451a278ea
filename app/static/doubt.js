// How much of what a model found it expects to be wrong away from outlines. Outlines are always uncertain, and more
// of a small object is outline. Knows no page and no model.

const REACH = 2; // pixels on both sides of an outline that are left out

/**
 * The probability of the wrong class, summed over the pixels away from outlines, per found pixel.
 *
 * @param png {width, height, data}: probabilities from 0 to 65535
 * @param threshold from which a pixel is found, 0 to 1
 * @returns null if nothing is found
 */
export function measureDoubt({ width, height, data }, threshold) {
  const found = new Uint8Array(data.length); // a loop, because Uint8Array.from is slow
  for (let i = 0; i < data.length; i += 1) found[i] = data[i] >= threshold * 65535 ? 1 : 0;
  const near = findOutlines(found, width, height);
  let [count, wrong] = [0, 0];
  for (let i = 0; i < data.length; i += 1) {
    count += found[i];
    if (!near[i]) wrong += found[i] ? 65535 - data[i] : data[i];
  }
  return count ? wrong / 65535 / count : null;
}

/** 1 for pixels that have another class within `REACH` pixels, diagonals included. */
function findOutlines(found, width, height) {
  const near = new Uint8Array(found.length);
  const mark = (left, right, top, bottom) => {
    const [from, to] = [Math.max(0, left), Math.min(width, right + 1)];
    for (let y = Math.max(0, top); y <= Math.min(height - 1, bottom); y += 1) near.fill(1, y * width + from, y * width + to);
  };
  for (let y = 0, i = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1, i += 1) {
      // a square around a pixel has two classes where it has two neighbors of different classes
      if (x + 1 < width && found[i] !== found[i + 1]) mark(x + 1 - REACH, x + REACH, y - REACH, y + REACH);
      if (y + 1 < height && found[i] !== found[i + width]) mark(x - REACH, x + REACH, y + 1 - REACH, y + REACH);
    }
  }
  return near;
}
