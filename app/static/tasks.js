// Work that visits every pixel or object of an image. It runs in a worker, so it knows neither the page nor its
// state: whatever it needs is an argument.

import { createPyramid, cropSquare, decode, release, stretchContrast, tintMask } from "./imaging.js";
import { rasterize, readTable } from "./objects.js";
import { readPng, writePng } from "./png.js";
import { crc32 } from "./zip.js";

const parse = async (blob) => JSON.parse(await blob.text());

/** {size, thumbnail, reason}: size and central square of a picture; null, and why, if the browser cannot show it. */
async function inspectImage(blob, side) {
  const { image, reason } = await decode(blob);
  if (!image) return { size: null, thumbnail: null, reason };
  const size = { width: image.width, height: image.height };
  const thumbnail = cropSquare(image, side);
  release(image);
  return { size, thumbnail, reason };
}

/** The central square of a mask as a tint; null if the mask exceeds the browser's limits. */
async function tintThumbnail(blob, side) {
  const mask = await createImageBitmap(blob).catch(() => null);
  const tint = mask && tintMask(mask, side);
  release(mask);
  return tint;
}

/** The picture at several scales, the largest first; empty if the browser cannot show it. */
async function loadPyramid(blob, stretched) {
  const { image } = await decode(blob);
  if (!image) return [];
  if (!stretched) return createPyramid(image);
  const levels = createPyramid(stretchContrast(image));
  release(image);
  return levels;
}

/** The label of each pixel, see `rasterize`; null if the outlines are not of `count` objects. */
async function readLabels(mask, polygons, count) {
  const collection = await parse(polygons);
  if (collection.features.length !== count) return null;
  const { width, height, data } = await readPng(mask);
  return rasterize(collection, width, height, data);
}

/** The label of each pixel, 0 where `kept` says that an object was removed. */
async function readKeptLabels(polygons, { width, height }, kept) {
  const labels = rasterize(await parse(polygons), width, height, null);
  for (let i = 0; i < labels.length; i += 1) if (labels[i] && !kept[labels[i] - 1]) labels[i] = 0;
  return labels;
}

async function writeLabels(polygons, size, kept) {
  return writePng({ ...size, depth: 16, color: 0, data: await readKeptLabels(polygons, size, kept) });
}

async function editMask(original, polygons, size, kept) {
  const mask = await readPng(original);
  const labels = await readKeptLabels(polygons, size, kept);
  for (let i = 0; i < labels.length; i += 1) if (!labels[i]) mask.data[i] = 0;
  return writePng(mask);
}

/** The border of a cutout is soft: its pixels up to two beyond the mask stay. */
async function editCutout(original, polygons, size, kept) {
  const cutout = await readPng(original);
  const { width, height, data } = cutout;
  const labels = await readKeptLabels(polygons, size, kept);
  const near = (x, y) => {
    for (let v = Math.max(0, y - 2); v <= Math.min(height - 1, y + 2); v += 1) {
      for (let u = Math.max(0, x - 2); u <= Math.min(width - 1, x + 2); u += 1) if (labels[v * width + u]) return true;
    }
    return false;
  };
  for (let i = 0; i < labels.length; i += 1) {
    if (data[4 * i + 3] && !labels[i] && !near(i % width, Math.floor(i / width))) data.fill(0, 4 * i, 4 * i + 4);
  }
  return writePng(cutout);
}

/** The kept outlines. `measured` has pairs of a name and the values of all objects. */
async function editPolygons(polygons, kept, measured) {
  const collection = await parse(polygons);
  collection.features = collection.features.filter((_, index) => kept[index]);
  for (const { id, properties } of collection.features) {
    properties.measurements = Object.fromEntries(measured.map(([name, values]) => [name, Number(values[id - 1].toPrecision(8))]));
  }
  return new Blob([JSON.stringify(collection)], { type: "application/geo+json" });
}

async function editCoco(original, kept) {
  const document = await parse(original);
  document.annotations = document.annotations.filter(({ id }) => kept[id - 1]);
  return new Blob([JSON.stringify(document)], { type: "application/json" });
}

export const TASKS = {
  inspectImage,
  tintThumbnail,
  loadPyramid,
  readTable: async (polygons, size) => readTable(await parse(polygons), size),
  readLabels,
  readSamples: async (png) => (await readPng(png)).data,
  writeLabels,
  editMask,
  editCutout,
  editPolygons,
  editCoco,
  checksum: async (blob) => crc32(new Uint8Array(await blob.arrayBuffer())),
};
