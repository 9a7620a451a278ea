// The item that is shown. Of it alone there are bitmaps and canvases, made anew from its file and its
// mask whenever it is chosen: of 2048 × 2048 pixels they take 65 MB, which a folder must not multiply.

import { decode, paint, release, sameSize, untinted } from "./pictures.js";

const $ = (id) => document.getElementById(id);
const view = { overlay: true, outline: false, mask: false };
let shown = null;
let held = null; // {item, blob, overlay, picture, mask, area, outline, failed}
let loading = null;

export const current = () => shown;

/** Show another item, or with null none. */
export function show(item) {
  shown = item;
  if (held && held.item !== item) drop();
  return refresh();
}

/** Say and draw what the shown item has become; resolves when it is on the canvas. */
export function refresh(item = shown) {
  if (item !== shown) return Promise.resolve();
  if (!shown) return Promise.resolve(drop());
  write();
  if (!stale()) return loading || Promise.resolve();
  loading ??= load();
  return loading;
}

export function toggle(name) {
  view[name] = !view[name];
  if (name === "outline" && view.outline) view.overlay = true;
  for (const each of Object.keys(view)) $(each).setAttribute("aria-pressed", String(view[each]));
  draw();
}

const fits = (layers) =>
  layers && layers.item === shown && layers.blob === shown.blob && layers.overlay === shown.overlay;
const stale = () => shown && !fits(held);

/** One at a time, until what is there is what was asked for last: who holds an arrow key down passes
 * many, and none of those between is worth its memory. */
async function load() {
  while (stale()) {
    $("stage").setAttribute("aria-busy", "true");
    const layers = await layersOf(shown);
    if (fits(layers)) {
      drop();
      held = layers;
      write();
      draw();
    } else {
      release(layers.picture, layers.mask, layers.area, layers.outline);
    }
  }
  loading = null;
}

function drop() {
  if (held) release(held.picture, held.mask, held.area, held.outline);
  held = null;
}

async function layersOf(item) {
  const { blob, overlay } = item;
  const layers = { item, blob, overlay };
  try {
    if (blob) layers.mask = await createImageBitmap(blob);
    if (overlay) {
      const tinted = await createImageBitmap(overlay);
      layers.picture = untinted(tinted, layers.mask);
      release(tinted);
    } else {
      layers.picture = (await decode(item.file)).picture;
      if (layers.picture && layers.mask && !sameSize(layers.picture, layers.mask)) {
        release(layers.picture);
        layers.picture = null; // on its side, under a mask that is upright
      }
    }
    if (layers.mask) Object.assign(layers, paint(layers.mask));
  } catch {
    layers.failed = true; // larger than the browser's canvases, most likely
  }
  return layers;
}

function draw() {
  if (!fits(held)) return;
  const { picture, mask, area, outline } = held;
  const canvas = $("canvas");
  const context = canvas.getContext("2d");
  const source = mask || picture;
  canvas.width = source ? source.width : 640;
  canvas.height = source ? source.height : 320;
  // small images are shown at twice their size, as far as there is room
  canvas.style.width = `${Math.max(canvas.width, Math.min(2 * canvas.width, 640))}px`;
  if (view.mask && mask) {
    context.drawImage(mask, 0, 0);
  } else {
    if (picture) context.drawImage(picture, 0, 0);
    if (view.overlay && area) {
      context.globalAlpha = view.outline ? 1 : $("opacity").value / 100;
      context.drawImage(view.outline ? outline : area, 0, 0);
    }
  }
  $("stage").removeAttribute("aria-busy");
}

function write() {
  const here = fits(held) ? held : null;
  const over = shown.state === "failed" || shown.state === "done";
  const nothing = here ? here.failed || !(here.picture || here.mask) : shown.state === "failed";
  $("stage").hidden = over && nothing;
  $("name").textContent = shown.path;
  $("error").hidden = shown.state !== "failed";
  $("error").textContent = shown.error || "";
  const note = here?.failed && here.blob ? "The browser cannot draw this image; its mask can be downloaded." : shown.note;
  $("note").hidden = !note;
  $("note").textContent = note || "";
  facts();
}

/** What is known of the item, row by row; of what is not known there is no row. */
function facts() {
  const { figures, size, state } = shown;
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const seconds = (time) => `${time.toFixed(2)} s`;
  const own = (value) => value;
  const known = state === "done" ? figures : {};
  const rows = [
    ["Size", size, ({ width, height }) => `${width} × ${height}`],
    ["Objects", known.objects, own],
    ["Foreground", known.foreground, percent],
    ["Confidence", known.confidence, percent],
    ["Time", state === "done" ? shown.seconds : null, seconds],
    ["of it, network", known.network, seconds],
    ["Model", known.model || shown.model, own],
    ["Threshold", shown.threshold, own],
    ["Engine", known.engine, own],
  ].filter(([, value]) => value !== null && value !== undefined && value !== "");
  $("facts").replaceChildren(
    ...rows.map(([term, value, text]) => {
      const row = document.createElement("div");
      const dt = document.createElement("dt");
      const dd = document.createElement("dd");
      dt.textContent = term;
      dd.textContent = text(value);
      row.append(dt, dd);
      return row;
    }),
  );
}

for (const name of Object.keys(view)) $(name).addEventListener("click", () => toggle(name));
$("opacity").addEventListener("input", draw);
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !shown) return;
  if (["INPUT", "SELECT"].includes(event.target.tagName)) return;
  const name = { o: "overlay", l: "outline", m: "mask" }[event.key.toLowerCase()];
  if (name && !$(name).disabled) toggle(name);
});
