// The images and their queue. An item keeps its file and its mask as they are stored, a few kilobytes
// of mask and a file that stays on the disk; pixels are the viewer's.

import { TURNED, decode, release, sameSize, thumbnail, thumbnailMask } from "./pictures.js";
import { segment } from "./service.js";
import * as strip from "./strip.js";
import * as viewer from "./viewer.js";

const AT_ONCE = 3; // one decodes and one encodes while the engine has the third

// {file, path, sample, model, threshold, state, size, blob, overlay, figures, seconds, note, error,
//  waits, saved, run}; state is waiting, working, done or failed
export const items = [];
export const inState = (state) => items.filter((item) => item.state === state);
let running = 0;
let changed = () => {};

/** Have a function called whenever an item has changed. */
export function onChange(listener) {
  changed = listener;
}

/** Take {file, path} in, to be segmented as {model, threshold} say. */
export function add(files, settings) {
  const added = files.map((each) => ({ ...each, ...settings, state: "waiting" }));
  for (const item of added) {
    items.push(item);
    strip.add(item, () => select(item));
  }
  if (viewer.current()?.state !== "waiting") select(added[0]);
  next();
}

function select(item) {
  strip.choose(item);
  viewer.show(item);
  changed();
}

/** Once more, those that failed or all of them, with other settings if some are given. */
export function again(chosen, settings = {}) {
  for (const item of chosen) {
    item.run?.abort();
    Object.assign(item, settings, { blob: null, overlay: null, note: "", error: "", saved: false });
    setState(item, "waiting");
  }
  next();
}

export function clear() {
  for (const item of items) item.run?.abort();
  items.length = 0;
  strip.clear();
  viewer.show(null);
  changed();
}

function next() {
  while (running < AT_ONCE) {
    const [item] = inState("waiting");
    if (!item) break;
    running += 1;
    work(item).finally(() => {
      running -= 1;
      next();
    });
  }
  changed();
}

async function work(item) {
  const run = new AbortController();
  item.run = run;
  setState(item, "working");
  try {
    await make(item, run.signal);
    setState(item, "done");
  } catch (error) {
    if (run.signal.aborted) return; // removed, or begun anew
    item.error = error.message || "The service did not answer.";
    setState(item, "failed");
  }
}

async function make(item, signal) {
  const patience = {
    signal,
    waiting(why) {
      item.waits = why;
      changed();
    },
  };
  const { picture, why } = await decode(item.file);
  signal.throwIfAborted();
  if (picture) thumbnail(item.thumbnail, picture);
  const seen = picture && { width: picture.width, height: picture.height };
  release(picture);
  const started = performance.now();
  const { blob, figures } = await segment(item, "mask", patience);
  const seconds = (performance.now() - started) / 1000;
  if (!blob.type.startsWith("image/")) throw new Error("Something answered that is not the service.");
  const mask = await createImageBitmap(blob).catch(() => null); // too large for it, perhaps
  const size = mask && { width: mask.width, height: mask.height };
  let [overlay, note] = [null, mask && seen && !sameSize(seen, mask) ? TURNED : why];
  if (note) {
    // what the browser shows wrongly or not at all, the service draws: as an overlay, which the
    // viewer takes off again. The mask is made by now, and stays whatever becomes of this.
    try {
      overlay = (await segment(item, "overlay", patience)).blob;
      const tinted = await createImageBitmap(overlay);
      thumbnail(item.thumbnail, tinted);
      release(tinted);
    } catch (error) {
      overlay = null;
      note = `The mask is made, but there is no picture of this image: ${error.message}`;
    }
  }
  signal.throwIfAborted();
  if (mask && !overlay) (note ? thumbnail : thumbnailMask)(item.thumbnail, mask);
  release(mask);
  Object.assign(item, { blob, overlay, figures, seconds, size, note });
  await viewer.refresh(item);
  signal.throwIfAborted();
}

function setState(item, state) {
  item.state = state;
  item.waits = "";
  strip.tell(item);
  viewer.refresh(item);
  changed();
}
