// Objects -> a zip of ImageJ's ROIs, for the ROI Manager of ImageJ and Fiji. The bytes of each ROI are those of the
// service's `rois`, which roifile writes. Knows neither the page nor the service.

import { ringsOf } from "./objects.js";
import { zip } from "./zip.js";

const HEADER_BYTES = 64; // of either of the two headers
const VERSION = 229;
const [RECTANGLE, TRACED] = [1, 8]; // types; a composite ROI is a rectangle with a path
const [LABELS, BACKGROUNDS, SUBPIXEL] = [8, 32, 128]; // options
const [MOVE, LINE, CLOSE] = [0, 1, 4]; // segments of a path, as Java's PathIterator numbers them
const MAX_INTEGER = 60535; // ImageJ takes larger coordinates as floats alone
const MAX_COUNT = 0xffff;
const MAX_GROUP = 255;

/**
 * A zip with a ROI for each kept object, named by its label.
 *
 * @param collection the service's outlines
 * @param kept whether each object is kept
 * @param classes names of the classes, without the background
 * @param page from 0: where in a stack the ROIs are shown; null is on every page
 */
export function encodeRois({ features }, kept, classes, page) {
  const digits = String(features.length).length;
  const entries = features
    .filter((_, index) => kept[index])
    .map((feature) => {
      const name = String(feature.id).padStart(digits, "0");
      const group = Math.min(classes.indexOf(feature.properties.class) + 1, MAX_GROUP);
      return [`${name}.roi`, new Blob([encodeRoi(feature, name, group, page)])];
    });
  return zip(entries);
}

function encodeRoi({ bbox, geometry, properties }, name, group, page) {
  const rings = ringsOf(geometry);
  const isTraced = rings.length === 1;
  const isFar = Math.max(...bbox) > MAX_INTEGER;
  const count = isTraced ? rings[0].length - 1 : 0;
  const path = isTraced ? [] : rings.flatMap(toPath);
  const texts = name + describe(properties);
  const second = HEADER_BYTES + (isTraced ? count * (isFar ? 12 : 4) : 4 * path.length);
  const view = new DataView(new ArrayBuffer(second + HEADER_BYTES + 2 * texts.length));

  [..."Iout"].forEach((letter, index) => view.setUint8(index, letter.charCodeAt(0)));
  view.setInt16(4, VERSION);
  view.setUint8(6, isTraced ? TRACED : RECTANGLE);
  const [left, top, right, bottom] = bbox;
  [top, left, bottom, right].forEach((side, index) => view.setInt16(8 + 2 * index, side)); // modulo 65,536
  if (count <= MAX_COUNT) view.setUint16(16, count);
  else view.setInt32(18, count);
  view.setInt32(36, path.length);
  view.setInt16(50, LABELS | BACKGROUNDS | (isFar ? SUBPIXEL : 0));
  view.setInt32(56, page == null ? 0 : page + 1); // 0 is everywhere
  view.setInt32(60, second);
  if (isTraced) writeCorners(view, rings[0], count, bbox, isFar);
  path.forEach((value, index) => view.setFloat32(HEADER_BYTES + 4 * index, value));

  const text = second + HEADER_BYTES;
  view.setInt32(second + 16, text);
  view.setInt32(second + 20, name.length);
  view.setUint8(second + 30, group);
  view.setInt32(second + 40, text + 2 * name.length);
  view.setInt32(second + 44, texts.length - name.length);
  for (let i = 0; i < texts.length; i += 1) view.setUint16(text + 2 * i, texts.charCodeAt(i));
  return view;
}

const describe = (properties) => `class: ${properties.class}\nscore: ${properties.score.toFixed(4)}\n`;

/** All x, then all y, from the upper left corner of the box; then both again as floats, if they are far. */
function writeCorners(view, ring, count, [left, top], isFar) {
  for (let i = 0; i < count; i += 1) {
    const [x, y] = ring[i];
    view.setInt16(HEADER_BYTES + 2 * i, x - left);
    view.setInt16(HEADER_BYTES + 2 * (count + i), y - top);
    if (!isFar) continue;
    view.setFloat32(HEADER_BYTES + 4 * (count + i), x);
    view.setFloat32(HEADER_BYTES + 4 * (2 * count + i), y);
  }
}

/** A ring, whose last corner repeats the first, as segments: the kind of each, and the point where it ends. */
const toPath = (ring) => [...ring.slice(0, -1).flatMap(([x, y], index) => [index ? LINE : MOVE, x, y]), CLOSE];
