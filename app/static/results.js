// Downloads: the chosen files of one image, or a zip of all images with tables. Every file is made from what the
// first request brought, so that it holds what is seen and needs no further inference.

import { run } from "./background.js";
import { exportView, pictureOf } from "./layers.js";
import { classesOf, isMultiClass, thresholdOf } from "./models.js";
import { makeSafe, nameImages, stemOf, uniqueStems } from "./names.js";
import { isEdited, keptObjects, measure, pixelSizeOf, scale } from "./objects.js";
import { formatMeasurements, formatObjects, formatResults } from "./tables.js";
import { look } from "./viewer.js";
import { zip } from "./zip.js";

/** The files that can be downloaded: title, suffix, and a line on each. */
export const KINDS = {
  mask: { title: "Mask", suffix: "-mask.png", text: "Black and white picture: white where the model found something." },
  overlay: { title: "Overlay", suffix: "-overlay.png", text: "The picture as you see it now, with colors and outlines, at full size." },
  instances: { title: "Labels", suffix: "-instances.png", text: "16-bit PNG, each object has its own number. For CellProfiler, napari or Python; ordinary viewers show it black." },
  polygons: { title: "Outlines", suffix: ".geojson", text: "GeoJSON with measurements. Drag it into QuPath." },
  rois: { title: "ImageJ ROIs", suffix: "-rois.zip", text: "Open it in the ROI Manager of ImageJ or Fiji." },
  measurements: { title: "Measurements", suffix: "-measurements.csv", text: "A table for Excel or R: area, position, shape, intensity and score of each object." },
  cutout: { title: "Cutout", suffix: "-cutout.png", text: "The picture without its background (transparent PNG)." },
  probability: { title: "Probability", suffix: "-probability.png", text: "16-bit PNG: how sure the model is of each pixel, before the threshold." },
  coco: { title: "COCO", suffix: "-coco.json", text: "Masks of all objects for machine learning." },
};

/** How to make each kind of file, without the objects that were removed. */
const MAKERS = {
  mask: (item) => (isEdited(item) ? run("writeMask", item.outputs, keptObjects(item)) : item.outputs.mask),
  overlay: (item) => exportView(item, look),
  instances: makeLabels,
  polygons: makePolygons,
  rois: (item) => run("writeRois", item.outputs.polygons, keptObjects(item), classesOf(item), item.settings.page),
  measurements: (item) => new Blob([formatMeasurements(item)], { type: "text/csv" }),
  cutout: makeCutout,
  probability: (item) => item.outputs.probability,
  coco: (item) => run("writeCoco", item.outputs.polygons, item.size, keptObjects(item), classesOf(item), item.path),
};

/** The chosen files of an item, by kind. */
async function makeFiles(item, kinds) {
  const files = new Map();
  for (const kind of kinds) files.set(kind, await MAKERS[kind](item));
  return files;
}

function makeLabels(item) {
  if (item.table.count > 65535) throw new Error("More than 65,535 objects do not fit a 16-bit PNG. Use outlines.");
  return run("writeLabels", item.outputs.polygons, item.size, keptObjects(item));
}

function makePolygons(item) {
  if (!isEdited(item) && !scale.typed) return item.outputs.polygons;
  return run("writePolygons", item.outputs.polygons, keptObjects(item), measure(item.table, pixelSizeOf(item)));
}

/** Several classes have no threshold; their foreground ends where the background is as probable as all of them. */
function makeCutout(item) {
  const threshold = isMultiClass(item) ? 0.5 : Number(thresholdOf(item));
  return run("writeCutout", pictureOf({ item, outputs: item.outputs }), item.outputs, isEdited(item) ? keptObjects(item) : null, threshold);
}

/** Save the chosen files of one item: one as it is, several in a zip. */
export async function saveOne(item, kinds, version) {
  const name = stemOf(item).split("/").at(-1);
  if (kinds.length === 1) {
    save((await makeFiles(item, kinds)).get(kinds[0]), makeSafe(name + KINDS[kinds[0]].suffix));
    item.saved = true;
    return;
  }
  const alone = { ...item, path: item.path.split("/").at(-1) };
  await saveAll([alone], kinds, version, { name: makeSafe(`${name}.zip`) });
  item.saved = true;
}

/**
 * Save a zip that keeps the folder structure. Its results.csv has one row per image, failed ones too.
 *
 * @param items all items; the files of those that are done go into the zip
 * @param onProgress called with the number of finished images and their total
 * @returns the number of images that failed
 */
export async function saveAll(items, kinds, version, { onProgress = () => {}, signal, name } = {}) {
  const done = items.filter((item) => item.state === "done");
  const stems = uniqueStems(done, kinds.map((kind) => KINDS[kind].suffix));
  const names = nameImages(items);
  const made = new Map();
  const errors = new Map();
  for (const item of done) {
    signal?.throwIfAborted();
    try {
      made.set(item, await makeFiles(item, kinds));
    } catch (error) {
      errors.set(item, error.message);
    }
    onProgress(made.size + errors.size, done.length);
  }
  const saved = done.filter((item) => made.has(item));
  if (items.length === 1 && errors.size) throw new Error([...errors.values()][0]);
  const fileName = (item, kind) => makeSafe(stems.get(item) + KINDS[kind].suffix);
  const entries = saved.flatMap((item) => kinds.map((kind) => [fileName(item, kind), made.get(item).get(kind)]));
  const files = new Map(saved.map((item) => [item, kinds.map((kind) => fileName(item, kind)).join("; ")]));
  const table = (text) => new Blob([text], { type: "text/csv" });
  entries.push(["results.csv", table(formatResults(items, names, files, errors, version))]);
  entries.push(["objects.csv", table(formatObjects(saved, names))]);
  save(await zip(entries, (blob) => run("checksum", blob)), name || `${kinds.length === 1 ? { mask: "masks" }[kinds[0]] || kinds[0] : "results"}.zip`);
  for (const item of saved) item.saved = true;
  return errors.size;
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
