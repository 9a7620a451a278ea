// The selected item. Only this item has bitmaps and canvases, and they are made again from its file and
// mask at each selection: at 2048 × 2048 pixels they take 65 MB, too much for every image of a folder.

import { decode, paint, release, removeTint, sameSize } from "./imaging.js";

const $ = (id) => document.getElementById(id);
const view = { overlay: true, outline: false, mask: false };
let selected = null;
let layers = null; // {item, blob, overlay, image, mask, area, outline, failed}
let loading = null; // a promise while layers are being loaded

export const current = () => selected;

/** Show another item, or none if it is null. */
export function show(item) {
  selected = item;
  if (layers && layers.item !== item) dropLayers();
  return refresh();
}

/** Update the text and canvas if the item is selected. Resolves when the canvas is up to date. */
export function refresh(item = selected) {
  if (item !== selected) return Promise.resolve();
  if (!selected) return Promise.resolve(dropLayers());
  renderText();
  if (!isStale()) return loading || Promise.resolve();
  loading ??= loadLayers();
  return loading;
}

export function toggle(name) {
  view[name] = !view[name];
  if (name === "outline" && view.outline) view.overlay = true;
  for (const each of Object.keys(view)) $(each).setAttribute("aria-pressed", String(view[each]));
  draw();
}

const areCurrent = (candidate) =>
  candidate &&
  candidate.item === selected &&
  candidate.blob === selected.blob &&
  candidate.overlay === selected.overlay;
const isStale = () => selected && !areCurrent(layers);

/** Load one item at a time until the selected one is loaded. An arrow key held down passes many items;
 * those that are no longer selected are dropped. */
async function loadLayers() {
  while (isStale()) {
    $("stage").setAttribute("aria-busy", "true");
    const loaded = await createLayers(selected);
    if (areCurrent(loaded)) {
      dropLayers();
      layers = loaded;
      renderText();
      draw();
    } else {
      releaseLayers(loaded);
    }
  }
  loading = null;
}

function dropLayers() {
  if (layers) releaseLayers(layers);
  layers = null;
}

const releaseLayers = ({ image, mask, area, outline }) => release(image, mask, area, outline);

async function createLayers(item) {
  const { blob, overlay } = item;
  const created = { item, blob, overlay };
  try {
    if (blob) created.mask = await createImageBitmap(blob);
    if (overlay) {
      const tinted = await createImageBitmap(overlay);
      created.image = removeTint(tinted, created.mask);
      release(tinted);
    } else {
      created.image = (await decode(item.file)).image;
      if (created.image && created.mask && !sameSize(created.image, created.mask)) {
        release(created.image);
        created.image = null; // the browser ignored its orientation, so that it does not fit the mask
      }
    }
    if (created.mask) Object.assign(created, paint(created.mask));
  } catch {
    created.failed = true; // probably larger than the browser's limit of a canvas
  }
  return created;
}

function draw() {
  if (!areCurrent(layers)) return;
  const { image, mask, area, outline } = layers;
  const canvas = $("canvas");
  const context = canvas.getContext("2d");
  const source = mask || image;
  canvas.width = source ? source.width : 640;
  canvas.height = source ? source.height : 320;
  // enlarge small images to twice their size, up to 640 pixels
  canvas.style.width = `${Math.max(canvas.width, Math.min(2 * canvas.width, 640))}px`;
  if (view.mask && mask) {
    context.drawImage(mask, 0, 0);
  } else {
    if (image) context.drawImage(image, 0, 0);
    if (view.overlay && area) {
      context.globalAlpha = view.outline ? 1 : $("opacity").value / 100;
      context.drawImage(view.outline ? outline : area, 0, 0);
    }
  }
  $("stage").removeAttribute("aria-busy");
}

function renderText() {
  const loaded = areCurrent(layers) ? layers : null;
  const finished = selected.state === "failed" || selected.state === "done";
  const empty = loaded ? loaded.failed || !(loaded.image || loaded.mask) : selected.state === "failed";
  $("stage").hidden = finished && empty;
  $("name").textContent = selected.path;
  $("error").hidden = selected.state !== "failed";
  $("error").textContent = selected.error || "";
  const undrawable = loaded?.failed && loaded.blob;
  const note = undrawable ? "Your browser cannot draw this image. Its mask can be downloaded." : selected.note;
  $("note").hidden = !note;
  $("note").textContent = note || "";
  renderFacts();
}

/** List the known facts about the item. A fact that is not known has no row. */
function renderFacts() {
  const { statistics, size, state } = selected;
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const seconds = (time) => `${time.toFixed(2)} s`;
  const text = (value) => value;
  const known = state === "done" ? statistics : {};
  const rows = [
    ["Size", size, ({ width, height }) => `${width} × ${height}`],
    ["Objects", known.objects, text],
    ["Foreground", known.foreground, percent],
    ["Confidence", known.confidence, percent],
    ["Time", state === "done" ? selected.seconds : null, seconds],
    ["Model time", known.modelSeconds, seconds],
    ["Model", known.model || selected.model, text],
    ["Threshold", selected.threshold, text],
    ["Engine", known.engine, text],
  ].filter(([, value]) => value !== null && value !== undefined && value !== "");
  $("facts").replaceChildren(
    ...rows.map(([term, value, format]) => {
      const row = document.createElement("div");
      const dt = document.createElement("dt");
      const dd = document.createElement("dd");
      dt.textContent = term;
      dd.textContent = format(value);
      row.append(dt, dd);
      return row;
    }),
  );
}

for (const name of Object.keys(view)) $(name).addEventListener("click", () => toggle(name));
$("opacity").addEventListener("input", draw);
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !selected) return;
  if (["INPUT", "SELECT"].includes(event.target.tagName)) return;
  const name = { o: "overlay", l: "outline", m: "mask" }[event.key.toLowerCase()];
  if (name && !$(name).disabled) toggle(name);
});
