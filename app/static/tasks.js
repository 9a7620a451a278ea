// Work that visits every pixel or object of an image. It runs in a worker, so it knows neither the page nor its
// state: whatever it needs is an argument.

import { encodeCoco } from "./coco.js";
import { cutOut, softenEdge } from "./cutout.js";
import { measureDoubt } from "./doubt.js";
import { createPyramid, cropSquare, decode, release, sameSize, stretchContrast, tintMask } from "./imaging.js";
import { rasterize, readTable } from "./objects.js";
import { readPng, writePng } from "./png.js";
import { inspectParts } from "./parts.js";
import { encodeRois } from "./rois.js";
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

/** The mask's PNG, decoded. With `kept` it has the kept objects alone. */
async function readMask({ mask, polygons }, kept) {
  const png = await readPng(mask);
  if (!kept) return png;
  const labels = await readKeptLabels(polygons, png, kept);
  for (let i = 0; i < labels.length; i += 1) if (!labels[i]) png.data[i] = 0;
  return png;
}

/** The picture where the mask is, see `softenEdge`. */
async function writeCutout(picture, outputs, kept, threshold) {
  const { width, height, data: mask } = await readMask(outputs, kept);
  const { data: probability } = await readPng(outputs.probability);
  const alpha = softenEdge(mask, probability, width, height, threshold);
  const { image } = await decode(picture);
  if (!image || !sameSize(image, { width, height })) throw new Error("Your browser cannot draw this image.");
  const data = cutOut(image, alpha);
  release(image);
  return writePng({ width, height, depth: 8, color: 6, data });
}

/** The kept outlines. `measured` has pairs of a name and the values of all objects. */
async function writePolygons(polygons, kept, measured) {
  const collection = await parse(polygons);
  collection.features = collection.features.filter((_, index) => kept[index]);
  for (const { id, properties } of collection.features) {
    properties.measurements = Object.fromEntries(measured.map(([name, values]) => [name, Number(values[id - 1].toPrecision(8))]));
  }
  return new Blob([JSON.stringify(collection)], { type: "application/geo+json" });
}

async function writeCoco(polygons, ...details) {
  return new Blob([encodeCoco(await parse(polygons), ...details)], { type: "application/json" });
}

export const TASKS = {
  inspectImage,
  tintThumbnail,
  loadPyramid,
  readTable: async (polygons, size) => readTable(await parse(polygons), size),
  readLabels,
  measureDoubt: async (png, threshold) => measureDoubt(await readPng(png), threshold),
  inspectParts: async (mask) => inspectParts(await readPng(mask)),
  readSamples: async (png) => (await readPng(png)).data,
  writeLabels,
  writeMask: async (outputs, kept) => writePng(await readMask(outputs, kept)),
  writeCutout,
  writePolygons,
  writeRois: async (polygons, ...details) => encodeRois(await parse(polygons), ...details),
  writeCoco,
  checksum: async (blob) => crc32(new Uint8Array(await blob.arrayBuffer())),
};
