// The decoded pixels of one item, and how they are drawn. Only the selected item has layers; a worker makes
// them again from its file and outputs at each selection.

import { run } from "./background.js";
import { createCanvas, release, sameSize } from "./imaging.js";
import { isEdited, keptObjects, restLabel } from "./objects.js";
import { BLACK, WHITE, colorOf, paintLabels, parseColor, sampleView } from "./paint.js";

const BAND = 256; // rows that are drawn at once for a file

/** Load the layers of an item: {item, outputs, width, height, levels, labels, probability, decoding, failed}. */
export async function createLayers(item) {
  const { outputs, table } = item;
  const layers = { item, outputs, levels: [], stretched: null, labels: null, probability: null, decoding: null };
  try {
    const levels = await run("loadPyramid", pictureOf(layers), false);
    Object.assign(layers, outputs ? item.size : levels.length && { width: levels[0].width, height: levels[0].height });
    // An image whose orientation the browser ignores does not fit its mask.
    if (levels.length && sameSize(levels[0], layers)) layers.levels = levels;
    else release(...levels);
    if (outputs) layers.labels = await run("readLabels", outputs.mask, outputs.polygons, table.count);
  } catch {
    layers.failed = true; // probably larger than the browser's limits
  }
  return layers;
}

/** The file, or what the service drew where the browser cannot show it. */
export const pictureOf = ({ item, outputs }) => outputs?.preview || item.file;

/** Load the picture with more contrast as well. */
export async function loadStretched(layers) {
  if (layers.stretched || !layers.levels.length) return;
  const stretched = await run("loadPyramid", pictureOf(layers), true);
  if (layers.released || layers.stretched) release(...stretched);
  else layers.stretched = stretched;
}

export function releaseLayers(layers) {
  if (!layers) return;
  release(...layers.levels, ...(layers.stretched || []));
  layers.levels = [];
  layers.stretched = null;
  layers.released = true;
}

/** Decode the probabilities, 0 to 65535, once. */
export async function decodeProbability(layers) {
  if (!layers.outputs?.probability) return;
  layers.decoding ??= run("readSamples", layers.outputs.probability).catch(() => null); // may lack the memory
  layers.probability = await layers.decoding;
}

/**
 * Draw what a view shows.
 *
 * @param view {x, y, scale}, see paint.js
 * @param look {shown, opacity, colors, color, contrast}: what the user chose to see
 * @param marks {hovered, selected, cutoff, wipe}: labels, the live threshold, and the share with an overlay
 */
export function drawView(context, layers, view, look, marks, scratch, thickness = 1) {
  const { width: viewWidth, height: viewHeight } = context.canvas;
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.globalAlpha = 1;
  context.fillStyle = "#0b100f";
  context.fillRect(0, 0, viewWidth, viewHeight);
  if (!layers.width) return;
  drawImageLevel(context, layers, view, look);
  if (!layers.labels || look.shown === "image" || !marks.wipe) return;
  const live = marks.cutoff !== null && layers.probability;
  const source = live ? layers.probability : layers.labels;
  const cutoff = live ? Math.max(1, marks.cutoff * 65535) : null;
  const { fill, edge } = live ? liveColors(look) : chooseColors(layers.item, look, marks);
  const sampled = sampleView(source, layers.width, layers.height, view, viewWidth, viewHeight, cutoff);
  if (scratch.width !== viewWidth || scratch.height !== viewHeight) Object.assign(scratch, { width: viewWidth, height: viewHeight });
  const target = scratch.getContext("2d");
  const pixels = target.createImageData(viewWidth, viewHeight);
  paintLabels(sampled, viewWidth, viewHeight, fill, edge, thickness, new Uint32Array(pixels.data.buffer));
  target.putImageData(pixels, 0, 0);
  context.save();
  context.beginPath();
  // not beyond the image: the background of a mask is black, that of the page is not
  const left = Math.max(0, -view.x * view.scale);
  const top = Math.max(0, -view.y * view.scale);
  const right = Math.min(viewWidth * marks.wipe, (layers.width - view.x) * view.scale);
  const bottom = Math.min(viewHeight, (layers.height - view.y) * view.scale);
  context.rect(left, top, Math.max(0, right - left), Math.max(0, bottom - top));
  context.clip();
  context.drawImage(scratch, 0, 0);
  context.restore();
}

function drawImageLevel(context, layers, { x, y, scale }, look) {
  const levels = (look.contrast && layers.stretched) || layers.levels;
  if (!levels.length) return;
  // the smallest level that has at least a pixel per pixel of the view
  const index = Math.max(0, Math.min(levels.length - 1, Math.floor(-Math.log2(Math.max(scale, 1e-6)))));
  const level = levels[index];
  const [stepX, stepY] = [layers.width / level.width, layers.height / level.height];
  context.imageSmoothingEnabled = scale < 2;
  // only the visible part: a browser may otherwise scale all of a large image
  const left = Math.max(0, x);
  const top = Math.max(0, y);
  const right = Math.min(layers.width, x + context.canvas.width / scale);
  const bottom = Math.min(layers.height, y + context.canvas.height / scale);
  if (right <= left || bottom <= top) return;
  context.drawImage(
    level,
    left / stepX, top / stepY, (right - left) / stepX, (bottom - top) / stepY,
    (left - x) * scale, (top - y) * scale, (right - left) * scale, (bottom - top) * scale,
  );
}

const withAlpha = (color, share) => ((color & 0xffffff) | (Math.round(255 * share) << 24)) >>> 0;

/** {fill, edge}: colors by label. */
function chooseColors(item, look, { hovered, selected }) {
  const { table } = item;
  const kept = keptObjects(item);
  const fill = new Uint32Array(table.count + 2);
  const edge = new Uint32Array(table.count + 2);
  const single = parseColor(look.color);
  const classes = new Set(table.classes).size;
  const classColor = (index) => {
    const [red, green, blue] = table.colors[index];
    return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
  };
  for (let label = 1; label <= table.count; label += 1) {
    if (!kept[label - 1]) continue;
    const color = classes > 1 ? classColor(label - 1) : look.colors === "each" ? colorOf(label) : single;
    if (look.shown === "mask") {
      fill[label] = classes > 1 ? color : WHITE;
      continue;
    }
    fill[label] = look.shown === "fill" ? withAlpha(color, look.opacity) : 0;
    edge[label] = look.shown === "fill" ? color : withAlpha(color, 0.5 + 0.5 * look.opacity);
    if (label === hovered || label === selected) {
      edge[label] = WHITE;
      fill[label] = withAlpha(color, label === selected ? 0.65 : Math.max(0.35, look.opacity));
    }
  }
  const rest = restLabel(table); // in the mask, but not an object; not in an edited mask
  if (look.shown === "mask") {
    fill[0] = BLACK;
    fill[rest] = isEdited(item) ? BLACK : WHITE;
    for (let label = 1; label <= table.count; label += 1) fill[label] ||= BLACK;
  } else if (look.shown === "fill" && !isEdited(item)) {
    fill[rest] = withAlpha(0xb0b0b0, look.opacity * 0.6);
  }
  return { fill, edge };
}

function liveColors(look) {
  if (look.shown === "mask") return { fill: Uint32Array.of(BLACK, WHITE), edge: Uint32Array.of(0, 0) };
  const color = parseColor(look.color);
  return {
    fill: Uint32Array.of(0, look.shown === "fill" ? withAlpha(color, look.opacity) : 0),
    edge: Uint32Array.of(0, color),
  };
}

/** Let the page respond before the next band is drawn. */
const nextTask = () => new Promise((resolve) => setTimeout(resolve));

/** A PNG of the whole image as the view shows it, without marks. */
export async function exportView(item, look) {
  const layers = await createLayers(item);
  try {
    if (layers.failed) throw new Error("Your browser cannot draw this image.");
    if (look.contrast) await loadStretched(layers);
    const whole = createCanvas(layers.width, layers.height);
    const band = createCanvas(layers.width, Math.min(BAND, layers.height));
    const scratch = createCanvas(1, 1);
    const target = whole.getContext("2d");
    const marks = { hovered: 0, selected: 0, cutoff: null, wipe: 1 };
    const step = band.height - 4; // bands overlap, because outlines look at their neighbors
    for (let y = 0; y < layers.height; y += step) {
      drawView(band.getContext("2d"), layers, { x: 0, y: y - 2, scale: 1 }, look, marks, scratch);
      target.drawImage(band, 0, 2, layers.width, step, 0, y, layers.width, step);
      await nextTask();
    }
    const blob = await new Promise((resolve) => {
      whole.toBlob(resolve, "image/png");
    });
    release(whole, band, scratch);
    if (!blob) throw new Error("This image is too large for a picture drawn by your browser.");
    return blob;
  } finally {
    releaseLayers(layers);
  }
}
