// Objects -> a COCO data set of one image, in JSON, as the service's `coco`. Knows neither the page nor the service.

import { ringsOf } from "./objects.js";

/**
 * @param collection the service's outlines
 * @param kept whether each object is kept
 * @param classes names of the classes, without the background
 * @param name of the image's file
 */
export function encodeCoco({ features }, { width, height }, kept, classes, name) {
  const annotate = ({ id, bbox: [left, top, right, bottom], geometry, properties }) => ({
    id,
    image_id: 1,
    category_id: classes.indexOf(properties.class) + 1,
    segmentation: { size: [height, width], counts: compressRuns(countRuns(ringsOf(geometry), width, height)) },
    area: properties.area,
    bbox: [left, top, right - left, bottom - top],
    iscrowd: 0,
    score: properties.score,
  });
  return JSON.stringify({
    images: [{ id: 1, width, height, file_name: name }],
    annotations: features.filter((_, index) => kept[index]).map(annotate),
    categories: classes.map((each, index) => ({ id: index + 1, name: each, supercategory: "" })),
  });
}

/**
 * Lengths of the runs outside, inside, outside, and so on, column by column.
 *
 * Outlines follow the edges of pixels. So every horizontal edge of an outline begins or ends a run.
 */
function countRuns(rings, width, height) {
  const ends = [];
  for (const ring of rings) {
    for (let i = 1; i < ring.length; i += 1) {
      const [from, y] = ring[i - 1];
      const [to, next] = ring[i];
      if (y !== next) continue;
      for (let x = Math.min(from, to); x < Math.max(from, to); x += 1) ends.push(x * height + y);
    }
  }
  const sorted = Float64Array.from(ends).sort();
  const counts = [];
  let last = 0;
  for (let i = 0; i < sorted.length; i += 1) {
    if (sorted[i] === sorted[i + 1]) {
      i += 1; // a run continues at the top of the next column
      continue;
    }
    counts.push(sorted[i] - last);
    last = sorted[i];
  }
  if (last < width * height) counts.push(width * height - last);
  return counts;
}

/** Runs as the text of pycocotools (rleToString in maskApi.c): differences to the run before the last, 5 bits a letter. */
function compressRuns(counts) {
  const codes = [];
  counts.forEach((count, index) => {
    let rest = index > 2 ? count - counts[index - 2] : count;
    for (let more = true; more; ) {
      let bits = rest & 31;
      rest >>= 5;
      more = rest !== (bits & 16 ? -1 : 0);
      if (more) bits |= 32;
      codes.push(String.fromCharCode(bits + 48));
    }
  });
  return codes.join("");
}
