// The images and what becomes of them. An item keeps its file, which stays on the disk, the encoded outputs
// and the table of its objects. Decoded pixels are kept by viewer.js for the selected item only.

import { run as runTask } from "./background.js";
import { TURNED, drawThumbnail, release, sameSize } from "./imaging.js";
import { findAgain } from "./objects.js";
import { resetPause, runAlone, segmentPatiently } from "./queue.js";
import * as strip from "./strip.js";
import { describeUnlike, readDoubt, readUncertainty } from "./unlike.js";
import * as viewer from "./viewer.js";

const CONCURRENCY = 3; // one request decodes and one encodes while the engine runs the third
const LARGE_PIXELS = 4e6; // such an image is sent alone
const LARGE_BYTES = 8e6; // the same for a format that the browser does not read

// An item: {file, path, sample, settings, state, outputs, table, deleted, size, statistics, seconds, date, note,
// unlike, uncertainty, doubt, parts, choices, cutOff, error, saved, controller, used, removed}. settings is {model,
// threshold, page, channel}; used are those of the outputs. deleted has the labels of deleted objects, removed their
// boxes, by which they are recognized when the image is run again. state is waiting, working, done, failed or stopped.
export const items = [];
export const inState = (...states) => items.filter((item) => states.includes(item.state));
let running = 0;
let notifyChange = () => {};

/** Call `listener` whenever an item has changed. */
export function onChange(listener) {
  notifyChange = listener;
}

/** Queue files, given as {file, path}, with settings. */
export function add(files, settings) {
  const added = files.map((each) => ({ ...each, settings: { ...settings, ...each.settings }, state: "waiting" }));
  for (const item of added) {
    items.push(item);
    strip.add(item, () => select(item));
  }
  if (viewer.current()?.state !== "waiting") select(added[0]);
  startNext();
}

export function select(item) {
  strip.select(item);
  viewer.show(item);
  notifyChange();
}

/** Queue items again, with settings that replace those given. The old result stays until the new one arrives. */
export function rerun(chosen, settings = {}) {
  for (const item of chosen) {
    item.controller?.abort();
    item.settings = { ...item.settings, ...settings };
    item.error = "";
    setState(item, "waiting");
  }
  startNext();
}

/** Stop everything that is not done. `rerun` resumes it. */
export function stop() {
  for (const item of inState("waiting", "working")) {
    item.controller?.abort();
    if (item.outputs) item.settings = item.used; // the result on the screen is the earlier one
    setState(item, item.outputs ? "done" : "stopped");
  }
  resetPause();
}

/** Remove an item. Returns the item next to it, or undefined. */
export function remove(item) {
  item.controller?.abort();
  const index = items.indexOf(item);
  items.splice(index, 1);
  strip.remove(item);
  const next = items[Math.min(index, items.length - 1)];
  if (viewer.current() === item) {
    if (next) select(next);
    else viewer.show(null);
  }
  if (!inState("waiting", "working").length) resetPause();
  notifyChange();
  return next;
}

export function clear() {
  for (const item of items) item.controller?.abort();
  items.length = 0;
  strip.clear();
  viewer.show(null);
  resetPause();
  notifyChange();
}

/** Tell the page that an item's objects were filtered or deleted. */
export function objectsChanged(...changed) {
  for (const item of changed) strip.render(item);
  notifyChange();
}

function startNext() {
  while (running < CONCURRENCY) {
    // the selected image first: its settings were just changed, or its user looks at it
    const waiting = inState("waiting");
    const item = waiting.find((each) => each === viewer.current()) || waiting[0];
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
    if (controller.signal.aborted) return; // removed, stopped or queued again
    item.outputs = item.table = null;
    item.error = error.message || "The server did not respond.";
    setState(item, "failed");
  }
}

const EMPTY = "This file is empty: it has 0 bytes. It may not have been copied or saved completely.";

async function process(item, signal) {
  if (!item.file.size) throw new Error(EMPTY);
  const { size: decodedSize, thumbnail, reason } = await runTask("inspectImage", item.file, strip.SIDE);
  signal.throwIfAborted();
  if (!item.outputs) drawThumbnail(item.thumbnail, thumbnail);
  const pixels = decodedSize ? decodedSize.width * decodedSize.height : 0;
  const isLarge = pixels > LARGE_PIXELS || item.file.size > LARGE_BYTES;
  const wanted = ["mask", "polygons", "probability"]; // from which every file is made
  if (!decodedSize) wanted.push("preview");

  const send = () => {
    const started = performance.now();
    return segmentWithChoices(item, wanted, signal).then((result) => ({
      ...result,
      seconds: (performance.now() - started) / 1000,
    }));
  };
  const { outputs, statistics, seconds } = isLarge ? await runAlone(signal, send) : await send();
  const size = await readSize(outputs.mask);
  let note = reason;
  if (decodedSize && !sameSize(decodedSize, size)) {
    note = TURNED;
    outputs.preview = (await segmentPatiently(item, ["preview"], signal)).outputs.preview;
  }
  const table = await runTask("readTable", outputs.polygons, size);
  const preview = outputs.preview && (await runTask("inspectImage", outputs.preview, strip.SIDE)).thumbnail;
  const parts = table.count ? null : await runTask("inspectParts", outputs.mask).catch(() => null); // may lack the memory
  const doubt = await readDoubt(outputs, statistics);
  const tint = await runTask("tintThumbnail", outputs.mask, strip.SIDE);
  drawThumbnail(item.thumbnail, preview || thumbnail, tint);
  release(thumbnail, preview, tint);
  signal.throwIfAborted();
  if (!isSamePicture(item)) item.removed = null;
  const { deleted, missing } = findAgain(item.removed || [], table);
  if (item.removed?.length) note = [note, describeDeleted(deleted.size, missing)].filter(Boolean).join(" ");
  const uncertainty = readUncertainty(item, statistics);
  Object.assign(item, { outputs, table, statistics, seconds, size, note, deleted, uncertainty, doubt, parts, date: new Date(), saved: false });
  item.used = item.settings;
  item.unlike = describeUnlike(item);
  await viewer.refresh(item);
  signal.throwIfAborted();
}

const isSamePicture = ({ used, settings }) => !used || (used.page === settings.page && used.channel === settings.channel);

/** Describe what became of the deleted objects of an image that was run again. */
function describeDeleted(found, missing) {
  const parts = [];
  if (found) parts.push(`${found} deleted ${found === 1 ? "object stays" : "objects stay"} deleted.`);
  if (missing) parts.push(`${missing} deleted ${missing === 1 ? "object was" : "objects were"} not found again.`);
  return parts.join(" ");
}

const CHOICE = /has (\d+) (page|channel)s\b.*\b\2=0/;

const CUT_OFF = /only its first page can be read/;

/**
 * Send an item. Where a file has several pages or channels, the service asks for a choice: the first is taken,
 * and the page says so and offers the others. Of a file that is cut off, the first page is all that can be read.
 */
async function segmentWithChoices(item, wanted, signal) {
  for (;;) {
    try {
      return await segmentPatiently(item, wanted, signal);
    } catch (error) {
      const [, count, name] = CHOICE.exec(error.message) || (CUT_OFF.test(error.message) ? [null, 1, "page"] : []);
      if (!name || item.settings[name] != null) throw error;
      if (count > 1) item.choices = { ...item.choices, [name]: Number(count) };
      else item.cutOff = true;
      item.settings = { ...item.settings, [name]: 0 };
    }
  }
}

/** Width and height of a PNG, which its first chunk has. */
async function readSize(png) {
  const head = new DataView(await png.slice(0, 24).arrayBuffer());
  if (head.byteLength < 24 || head.getUint32(0) !== 0x89504e47) throw new Error("Unexpected response (a proxy?)");
  return { width: head.getUint32(16), height: head.getUint32(20) };
}

function setState(item, state) {
  item.state = state;
  strip.render(item);
  viewer.refresh(item);
  notifyChange();
}
