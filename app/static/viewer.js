// The selected item on the canvas: zoom, pan, what is under the pointer. Only the selected item has decoded
// pixels: an image of 20 megapixels takes 120 MB, too much for every image of a folder.

import { createCanvas } from "./imaging.js";
import { createLayers, decodeProbability, drawView, loadStretched, releaseLayers } from "./layers.js";
import { keptObjects, pixelSizeOf } from "./objects.js";

const $ = (id) => document.getElementById(id);
const MAX_SCALE = 40;
const STEP = 1.3; // of a key or button
const CLICK_PIXELS = 4; // a pointer that moves less clicks

export const look = { shown: "fill", opacity: 0.35, colors: "each", color: "#ff4081", contrast: false };
const marks = { hovered: 0, selected: 0, cutoff: null, wipe: 1 };
const view = { x: 0, y: 0, scale: 1, fitted: true };

const stage = $("stage");
const canvas = $("canvas");
const scratch = createCanvas(1, 1);
let selected = null;
let layers = null;
let loading = null; // a promise while layers are being loaded
let hidden = false; // while the user holds "hide"
let frame = 0;
const listeners = { item() {}, object() {}, remove() {} };

export const current = () => selected;
export const selectedObject = () => marks.selected;
/** Set functions that are called when the item's text, the selected object change, or an object is to be deleted. */
export const listen = (functions) => Object.assign(listeners, functions);

/** Show another item, or none if it is null. */
export function show(item) {
  if (selected !== item) {
    marks.selected = marks.hovered = 0;
    marks.cutoff = null;
  }
  selected = item;
  if (layers && layers.item !== item) dropLayers();
  return refresh();
}

/** Update the text and canvas if the item is selected. Resolves when the canvas is up to date. */
export function refresh(item = selected) {
  if (item !== selected) return Promise.resolve();
  if (!selected) return Promise.resolve(dropLayers());
  listeners.item(describeLayers());
  if (!isStale()) return loading || Promise.resolve();
  loading ??= loadLayers();
  return loading;
}

const areCurrent = (candidate) => candidate && candidate.item === selected && candidate.outputs === (selected.outputs ?? candidate.outputs);
const isStale = () => selected && !areCurrent(layers);
const describeLayers = () => ({ empty: areCurrent(layers) && !layers.width, failed: areCurrent(layers) && layers.failed });

/** Load one item at a time until the selected one is loaded. An arrow key held down passes many items;
 * those that are no longer selected are dropped. */
async function loadLayers() {
  while (isStale()) {
    stage.setAttribute("aria-busy", "true");
    const loaded = await createLayers(selected);
    if (areCurrent(loaded)) {
      const sized = layers && layers.item === loaded.item && layers.width === loaded.width;
      dropLayers();
      layers = loaded;
      marks.selected = marks.hovered = 0;
      marks.cutoff = null;
      if (!sized) fit();
      drawNow();
      if (look.contrast) setContrast(true);
      stage.removeAttribute("aria-busy");
      listeners.item(describeLayers());
      listeners.object(0);
    } else {
      releaseLayers(loaded);
    }
  }
  loading = null;
}

function dropLayers() {
  releaseLayers(layers);
  layers = null;
}

// --- drawing ----------------------------------------------------------------------------------------

/** Draw at the next frame. */
export function redraw() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    drawNow();
  });
}

export function drawNow() {
  if (!layers) return;
  const ratio = devicePixelRatio || 1;
  const width = Math.max(1, Math.round(stage.clientWidth * ratio));
  const height = Math.max(1, Math.round(stage.clientHeight * ratio));
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const shownLook = hidden ? { ...look, shown: "image" } : look;
  drawView(context, layers, view, shownLook, marks, scratch, Math.max(1, Math.round((look.shown === "outline" ? 2 : 1) * ratio)));
  if (marks.wipe < 1 && !hidden) {
    context.fillStyle = "#fff";
    context.fillRect(width * marks.wipe - 1, 0, 2, height);
  }
  renderScaleBar(ratio);
  $("zoom").textContent = `${Math.round((100 * view.scale) / ratio)}%`;
}

/** A bar of a round length, if the size of a pixel is known. */
function renderScaleBar(ratio) {
  const size = selected && pixelSizeOf(selected);
  $("scale-bar").hidden = !size;
  if (!size) return;
  const micrometers = (120 * ratio * size) / view.scale; // of 120 CSS pixels
  const power = 10 ** Math.floor(Math.log10(micrometers));
  const length = [5, 2, 1].map((step) => step * power).find((each) => each <= micrometers);
  $("scale-bar").style.width = `${((length / size) * view.scale) / ratio}px`;
  $("scale-bar").textContent = `${Number(length.toPrecision(1))} µm`;
}

export const setWipe = (share) => {
  marks.wipe = share;
  redraw();
};
export async function setContrast(value) {
  look.contrast = value;
  redraw();
  if (!value || !layers) return;
  await loadStretched(layers).catch(() => null); // the browser may lack the memory
  redraw();
}
export const setHidden = (value) => {
  hidden = value;
  redraw();
};

/** Show the mask that a threshold gives, from the probabilities. */
export async function previewThreshold(cutoff) {
  marks.cutoff = cutoff;
  const of = layers;
  if (!of) return;
  if (!of.probability) await decodeProbability(of);
  if (of === layers) redraw();
}

// --- zoom and pan -----------------------------------------------------------------------------------

const stageSize = () => {
  const ratio = devicePixelRatio || 1;
  return [stage.clientWidth * ratio, stage.clientHeight * ratio];
};

export function fit() {
  if (!layers?.width) return;
  const [width, height] = stageSize();
  if (!width || !height) return;
  view.scale = Math.min(width / layers.width, height / layers.height, 8);
  view.x = (layers.width - width / view.scale) / 2;
  view.y = (layers.height - height / view.scale) / 2;
  setFitted(true);
  redraw();
}

/** One finger scrolls the page while the whole image is visible, and moves the image otherwise. */
function setFitted(fitted) {
  view.fitted = fitted;
  stage.classList.toggle("fitted", fitted);
}

/** Zoom by a factor; a point of the canvas stays where it is, by default the center. */
export function zoomBy(factor, point = stageSize().map((side) => side / 2)) {
  if (!layers?.width) return;
  const [width, height] = stageSize();
  const least = Math.min(width / layers.width, height / layers.height, 1) / 2;
  const next = Math.min(MAX_SCALE, Math.max(least, view.scale * factor));
  view.x += point[0] / view.scale - point[0] / next;
  view.y += point[1] / view.scale - point[1] / next;
  view.scale = next;
  setFitted(false);
  keepInside();
  redraw();
}

export const zoomToOne = () => zoomBy((devicePixelRatio || 1) / view.scale);

function panBy(x, y) {
  view.x -= x / view.scale;
  view.y -= y / view.scale;
  setFitted(false);
  keepInside();
  redraw();
}

/** Keep the middle of the stage on the image, so that it cannot be lost. */
function keepInside() {
  const [width, height] = stageSize().map((side) => side / view.scale / 2);
  view.x = Math.min(layers.width, Math.max(0, view.x + width)) - width;
  view.y = Math.min(layers.height, Math.max(0, view.y + height)) - height;
}

/** Select an object, 0 for none. With `find`, move the view to it if it is not well visible. */
export function selectObject(label, { find = false } = {}) {
  marks.selected = label;
  if (find && label && layers) {
    const [left, top, right, bottom] = selected.table.boxes[label - 1];
    const [x, y] = [(left + right) / 2, (top + bottom) / 2];
    const [width, height] = stageSize().map((side) => side / view.scale);
    const inside = x > view.x && x < view.x + width && y > view.y && y < view.y + height;
    if (!inside) {
      Object.assign(view, { x: x - width / 2, y: y - height / 2 });
      setFitted(false);
    }
  }
  redraw();
  listeners.object(label);
}

/** The kept object at a point of the page, or 0. */
function objectAt(event) {
  if (!layers?.labels || marks.cutoff !== null || hidden || look.shown === "image") return 0;
  const box = canvas.getBoundingClientRect();
  const ratio = devicePixelRatio || 1;
  const x = Math.floor(view.x + ((event.clientX - box.left) * ratio) / view.scale);
  const y = Math.floor(view.y + ((event.clientY - box.top) * ratio) / view.scale);
  if (x < 0 || y < 0 || x >= layers.width || y >= layers.height) return 0;
  const label = layers.labels[y * layers.width + x];
  return label && label <= selected.table.count && keptObjects(selected)[label - 1] ? label : 0;
}

const pointers = new Map(); // by id: {x, y}
let moved = 0;

const toCanvas = (event) => {
  const box = canvas.getBoundingClientRect();
  const ratio = devicePixelRatio || 1;
  return [(event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio];
};

stage.addEventListener("pointerdown", (event) => {
  if (event.target !== canvas || event.button) return;
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, toCanvas(event));
  if (pointers.size === 1) moved = 0;
});
stage.addEventListener("pointermove", (event) => {
  const before = pointers.get(event.pointerId);
  if (!before) return hover(event);
  const after = toCanvas(event);
  const shift = [after[0] - before[0], after[1] - before[1]];
  moved += Math.abs(shift[0]) + Math.abs(shift[1]);
  if (pointers.size === 2) {
    const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
    const distance = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]);
    zoomBy(distance(after) / Math.max(1, distance(before)), [(after[0] + other[0]) / 2, (after[1] + other[1]) / 2]);
    panBy(shift[0] / 2, shift[1] / 2);
  } else if (moved > CLICK_PIXELS && !(view.fitted && event.pointerType === "touch")) {
    panBy(...shift);
  }
  pointers.set(event.pointerId, after);
});
for (const name of ["pointerup", "pointercancel"]) {
  stage.addEventListener(name, (event) => {
    if (!pointers.delete(event.pointerId) || name === "pointercancel" || moved > CLICK_PIXELS) return;
    selectObject(objectAt(event));
  });
}
stage.addEventListener("pointerleave", () => setHovered(0));
stage.addEventListener(
  "wheel",
  (event) => {
    if (event.target !== canvas) return;
    event.preventDefault();
    zoomBy(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0018)), toCanvas(event));
  },
  { passive: false },
);
stage.addEventListener("dblclick", (event) => {
  if (event.target === canvas) zoomBy(2, toCanvas(event));
});

function hover(event) {
  const label = event.target === canvas ? objectAt(event) : 0;
  setHovered(label);
  if (!label) return;
  const box = stage.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  $("tip").style.left = `${Math.min(x + 14, stage.clientWidth - 190)}px`;
  $("tip").style.top = `${Math.min(y + 14, stage.clientHeight - 40)}px`;
}

function setHovered(label) {
  if (label === marks.hovered) return;
  marks.hovered = label;
  $("tip").hidden = !label;
  if (label) $("tip").textContent = listeners.describe(selected, label);
  redraw();
}

// Keys work while the stage has the focus alone, so that no single letter is a shortcut anywhere else.
const KEYS = {
  "+": () => zoomBy(STEP),
  "=": () => zoomBy(STEP),
  "-": () => zoomBy(1 / STEP),
  0: fit,
  1: zoomToOne,
  ArrowLeft: () => panBy(60, 0),
  ArrowRight: () => panBy(-60, 0),
  ArrowUp: () => panBy(0, 60),
  ArrowDown: () => panBy(0, -60),
  n: () => stepObject(1),
  p: () => stepObject(-1),
  h: () => setHidden(true),
  Delete: () => marks.selected && listeners.remove(marks.selected),
  Backspace: () => marks.selected && listeners.remove(marks.selected),
  Escape: () => selectObject(0),
};

// Speech recognition types the words it hears, so keys that are characters can be turned off (WCAG 2.1.4).
$("shortcuts").checked = localStorage.getItem("unet-shortcuts") !== "off";
$("shortcuts").addEventListener("change", () => localStorage.setItem("unet-shortcuts", $("shortcuts").checked ? "on" : "off"));

/** Select the next kept object, for those who do not use a pointer. */
function stepObject(step) {
  if (!selected?.table) return;
  const kept = keptObjects(selected).flatMap((each, index) => (each ? [index + 1] : []));
  if (!kept.length) return;
  const at = kept.indexOf(marks.selected);
  selectObject(kept[at < 0 ? 0 : (at + step + kept.length) % kept.length], { find: true });
}

stage.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target !== stage) return;
  const action = KEYS[event.key];
  if (!action || (event.key.length === 1 && !$("shortcuts").checked)) return;
  event.preventDefault();
  action();
});
stage.addEventListener("keyup", (event) => {
  if (event.key === "h") setHidden(false);
});
stage.addEventListener("blur", () => setHidden(false));

new ResizeObserver(() => (view.fitted ? fit() : redraw())).observe(stage);
