// The connected parts of a mask, and why none of them is an object. Knows neither the page nor the service.

/** Pixels of the smallest object that the service separates (MIN_PIXELS in model/instances.py). */
export const MIN_PIXELS = 36;

/**
 * Look at the pixels that a model found.
 *
 * @param mask {width, height, data}; pixels that are not 0 are found
 * @returns {pixels, large}: how many there are, and whether `MIN_PIXELS` of them are connected, diagonally too
 */
export function inspectParts({ width, height, data }) {
  let pixels = 0;
  for (let i = 0; i < data.length; i += 1) if (data[i]) pixels += 1;
  const seen = new Uint8Array(data.length);
  for (let i = 0; i < data.length; i += 1) {
    if (data[i] && !seen[i] && reaches(MIN_PIXELS, i, seen, { width, height, data })) return { pixels, large: true };
  }
  return { pixels, large: false };
}

/** Whether the part of a pixel has at least `least` pixels. Marks those that it visits. */
function reaches(least, start, seen, { width, height, data }) {
  const waiting = [start];
  seen[start] = 1;
  for (let visited = 1; waiting.length; visited += 1) {
    if (visited >= least) return true;
    const at = waiting.pop();
    const column = at % width;
    const row = (at - column) / width;
    for (let y = Math.max(0, row - 1); y <= Math.min(height - 1, row + 1); y += 1) {
      for (let x = Math.max(0, column - 1); x <= Math.min(width - 1, column + 1); x += 1) {
        const next = y * width + x;
        if (!data[next] || seen[next]) continue;
        seen[next] = 1;
        waiting.push(next);
      }
    }
  }
  return false;
}
