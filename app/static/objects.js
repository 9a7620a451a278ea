// The objects of an image: their measurements, the label of every pixel, and which of them are kept.
// Knows neither the page nor the service.

/** Pixels of the mask that belong to no object have the label after the last one. */
export const restLabel = (table) => table.count + 1;

/**
 * The measurements of a GeoJSON FeatureCollection of the service:
 * {count, classes, colors, areas, scores, atEdge, columns, pixelSize}.
 *
 * Lengths and areas in `columns` are in pixels. `pixelSize` is what the file says, in micrometres, or null.
 */
export function readTable(collection, { width, height }) {
  const { features } = collection;
  const properties = features.map((feature) => feature.properties);
  const column = (read) => Float64Array.from(properties, read);
  const areas = column((each) => each.area);
  const first = properties[0]?.measurements || {};
  const pixelSize = first.area_um2 ? Math.sqrt(first.area_um2 / properties[0].area) : null;
  const columns = new Map();
  for (const name of Object.keys(first)) {
    const factor = unitFactor(name, pixelSize || 1);
    columns.set(toPixels(name), column((each) => each.measurements[name] / factor));
  }
  return {
    count: features.length,
    classes: properties.map((each) => each.class),
    colors: properties.map((each) => each.classification.color),
    areas,
    scores: column((each) => each.score),
    atEdge: features.map(({ bbox }) => bbox[0] <= 0 || bbox[1] <= 0 || bbox[2] >= width || bbox[3] >= height),
    boxes: features.map(({ bbox }) => bbox),
    columns,
    pixelSize,
  };
}

const toPixels = (name) => name.replace(/_um2?$/, "_px");
const unitFactor = (name, pixelSize) => (name.endsWith("_um2") ? pixelSize ** 2 : name.endsWith("_um") ? pixelSize : 1);

/** [name, values] pairs of the measurements, in micrometres if the pixel size is given. */
export function measure(table, pixelSize) {
  return [...table.columns].map(([name, values]) => {
    if (!pixelSize || !name.endsWith("_px")) return [name, values];
    const renamed = name === "area_px" ? "area_um2" : name.replace(/_px$/, "_um");
    const factor = unitFactor(renamed, pixelSize);
    return [renamed, values.map((value) => value * factor)];
  });
}

/** {area, unit} of an object, for people. */
export function describeArea(pixels, pixelSize) {
  if (!pixelSize) return `${pixels.toLocaleString("en")} px`;
  const area = pixels * pixelSize ** 2;
  return `${area.toLocaleString("en", { maximumSignificantDigits: 4 })} µm²`;
}

/**
 * The label of every pixel: 0, 1 to n, or `restLabel` where the mask is set outside all objects.
 *
 * Outlines follow the edges of pixels. So every vertical edge of an outline switches the pixels to its
 * right, and the pixels after an odd number of switches are inside.
 *
 * @param mask the samples of the mask's PNG, or null
 */
export function rasterize(collection, width, height, mask) {
  const { features } = collection;
  const labels = new (features.length < 65535 ? Uint16Array : Uint32Array)(width * height);
  if (mask) {
    const rest = features.length + 1;
    for (let i = 0; i < labels.length; i += 1) if (mask[i]) labels[i] = rest;
  }
  for (const { id, bbox, geometry } of features) {
    const [left, top, right, bottom] = bbox;
    const stride = right - left + 1;
    const switches = new Uint8Array(stride * (bottom - top));
    for (const ring of ringsOf(geometry)) addSwitches(switches, ring, left, top, stride);
    for (let y = 0, i = 0; y < bottom - top; y += 1) {
      let inside = 0;
      for (let x = 0, at = (top + y) * width + left; x < stride; x += 1, i += 1, at += 1) {
        inside ^= switches[i];
        if (inside) labels[at] = id;
      }
    }
  }
  return labels;
}

/** The rings of an outline, one polygon after the other; the last corner of each repeats the first. */
export const ringsOf = ({ type, coordinates }) => (type === "Polygon" ? coordinates : coordinates.flat());

function addSwitches(switches, ring, left, top, stride) {
  for (let i = 1; i < ring.length; i += 1) {
    const [x, from] = ring[i - 1];
    if (ring[i][0] !== x) continue;
    const to = ring[i][1];
    for (let y = Math.min(from, to); y < Math.max(from, to); y += 1) switches[(y - top) * stride + x - left] ^= 1;
  }
}

/**
 * Find objects of an earlier run among those of a new one, by the overlap of their boxes.
 *
 * @param boxes [left, top, right, bottom] of the earlier objects
 * @returns {deleted, missing}: labels of the new ones, and the number of those that are not among them
 */
export function findAgain(boxes, table) {
  const deleted = new Set();
  let missing = 0;
  for (const box of boxes) {
    let [best, label] = [LEAST_OVERLAP, 0];
    table.boxes.forEach((other, index) => {
      const overlap = overlapOf(box, other);
      if (overlap >= best && !deleted.has(index + 1)) [best, label] = [overlap, index + 1];
    });
    if (label) deleted.add(label);
    else missing += 1;
  }
  return { deleted, missing };
}

const LEAST_OVERLAP = 0.4; // more than different objects share, less than one shares with itself at other thresholds

/** The area that two boxes share, divided by the area of both together. */
function overlapOf(a, b) {
  const [width, height] = [0, 1].map((axis) => Math.max(0, Math.min(a[axis + 2], b[axis + 2]) - Math.max(a[axis], b[axis])));
  const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
  const shared = width * height;
  return shared / Math.max(1, area(a) + area(b) - shared);
}

// --- which objects are kept -------------------------------------------------------------------------

/** The filter that applies to all images. Areas are in square micrometres if `inMicrometers`, and in pixels otherwise. */
export const filter = { minArea: 0, maxArea: Infinity, inMicrometers: false, minScore: 0, excludeEdges: false };
/** {typed}: micrometres per pixel for all images, or null. */
export const scale = { typed: null };

export const pixelSizeOf = (item) => scale.typed || item.table?.pixelSize || null;
export const isFilteringAreas = () => filter.minArea > 0 || filter.maxArea < Infinity;
export const isFiltering = () => isFilteringAreas() || filter.minScore > 0 || filter.excludeEdges;
/** Whether areas of this image cannot be compared with the filter, because the size of its pixels is unknown. */
export const lacksPixelSize = (item) => isFilteringAreas() && filter.inMicrometers && !pixelSizeOf(item);
/** Whether objects of this image are removed, by the filter or by hand. */
export const isEdited = (item) => Boolean(item.table) && keptCount(item) < item.table.count;

/** Whether each object is kept; index 0 is the object with the label 1. */
export function keptObjects(item) {
  const { table, deleted } = item;
  const unit = filter.inMicrometers ? pixelSizeOf(item) ** 2 : 1;
  const anyArea = lacksPixelSize(item);
  return Array.from(table.areas, (area, index) => {
    const inRange = anyArea || (area * unit >= filter.minArea && area * unit <= filter.maxArea);
    const edge = filter.excludeEdges && table.atEdge[index];
    return inRange && table.scores[index] >= filter.minScore && !edge && !deleted?.has(index + 1);
  });
}

export const keptCount = (item) => keptObjects(item).filter(Boolean).length;

const PLURALS = { nucleus: "nuclei", person: "people" };
/** "118 nuclei", for the objects of one class or of several. */
function countNoun(count, classes) {
  const names = [...new Set(classes)];
  const noun = names.length === 1 ? names[0] : "object";
  const number = count.toLocaleString("en");
  if (noun === "person") return `${number} ${count === 1 ? "region" : "regions"}`; // people who overlap are one
  return `${number} ${count === 1 ? noun : PLURALS[noun] || `${noun}s`}`;
}
export const describeCount = (item) => (item.table ? countNoun(keptCount(item), item.table.classes) : "");
