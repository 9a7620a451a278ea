// The images and their queue. An item keeps its file, which stays on the disk, and its encoded mask.
// Decoded pixels are kept by viewer.js for the selected item only.

import { ROTATED, decode, drawThumbnail, drawThumbnailMask, release, sameSize } from "./imaging.js";
import { segment } from "./service.js";
import * as strip from "./strip.js";
import * as viewer from "./viewer.js";

const CONCURRENCY = 3; // one request decodes and one encodes while the engine runs the third

// An item: {file, path, sample, model, threshold, state, size, blob, overlay, statistics, seconds, note,
// error, waitReason, saved, controller}. state is waiting, working, done or failed.
export const items = [];
export const inState = (state) => items.filter((item) => item.state === state);
let running = 0;
let notifyChange = () => {};

/** Call `listener` whenever an item has changed. */
export function onChange(listener) {
  notifyChange = listener;
}

/** Queue files, given as {file, path}, with the settings {model, threshold}. */
export function add(files, settings) {
  const added = files.map((each) => ({ ...each, ...settings, state: "waiting" }));
  for (const item of added) {
    items.push(item);
    strip.add(item, () => select(item));
  }
  if (viewer.current()?.state !== "waiting") select(added[0]);
  startNext();
}

function select(item) {
  strip.select(item);
  viewer.show(item);
  notifyChange();
}

/** Queue items again, with new settings if any are given. */
export function rerun(chosen, settings = {}) {
  for (const item of chosen) {
    item.controller?.abort();
    Object.assign(item, settings, { blob: null, overlay: null, note: "", error: "", saved: false });
    setState(item, "waiting");
  }
  startNext();
}

export function clear() {
  for (const item of items) item.controller?.abort();
  items.length = 0;
  strip.clear();
  viewer.show(null);
  notifyChange();
}

function startNext() {
  while (running < CONCURRENCY) {
    const [item] = inState("waiting");
    if (!item) break;
    running += 1;
    run(item).finally(() => {
      running -= 1;
      startNext();
    });
  }
  notifyChange();
}

async function run(item) {
  const controller = new AbortController();
  item.controller = controller;
  setState(item, "working");
  try {
    await process(item, controller.signal);
    setState(item, "done");
  } catch (error) {
    if (controller.signal.aborted) return; // removed or queued again
    item.error = error.message || "The server did not respond.";
    setState(item, "failed");
  }
}

async function process(item, signal) {
  const options = {
    signal,
    onWait(reason) {
      item.waitReason = reason;
      notifyChange();
    },
  };
  const { image, reason } = await decode(item.file);
  signal.throwIfAborted();
  if (image) drawThumbnail(item.thumbnail, image);
  const decodedSize = image && { width: image.width, height: image.height };
  release(image);
  const started = performance.now();
  const { blob, statistics } = await segment(item, "mask", options);
  const seconds = (performance.now() - started) / 1000;
  if (!blob.type.startsWith("image/")) throw new Error("Unexpected response (a proxy?)");
  const mask = await createImageBitmap(blob).catch(() => null); // it may exceed the browser's limits
  const size = mask && { width: mask.width, height: mask.height };
  const rotated = mask && decodedSize && !sameSize(decodedSize, mask);
  let note = rotated ? ROTATED : reason;
  let overlay = null;
  if (note) {
    // The browser shows this image wrongly or not at all, so the service draws it. The only output that
    // contains the image is the overlay; viewer.js removes its tint. The mask is kept if this fails.
    try {
      overlay = (await segment(item, "overlay", options)).blob;
      const tinted = await createImageBitmap(overlay);
      drawThumbnail(item.thumbnail, tinted);
      release(tinted);
    } catch (error) {
      overlay = null;
      note = `The mask is ready, but the image cannot be shown: ${error.message}`;
    }
  }
  signal.throwIfAborted();
  if (mask && !overlay) {
    if (note) drawThumbnail(item.thumbnail, mask);
    else drawThumbnailMask(item.thumbnail, mask);
  }
  release(mask);
  Object.assign(item, { blob, overlay, statistics, seconds, size, note });
  await viewer.refresh(item);
  signal.throwIfAborted();
}

function setState(item, state) {
  item.state = state;
  item.waitReason = "";
  strip.render(item);
  viewer.refresh(item);
  notifyChange();
}
