// What goes out: one mask, or a zip of all with a table of their figures.

import { segment } from "./service.js";
import { zip } from "./zip.js";

const AT_ONCE = 3; // as when the masks were made

/** Of the kind that was chosen; everything but the mask is made now. */
async function made(item, kind) {
  if (kind === "mask") return item.blob;
  const { blob, figures } = await segment(item, kind);
  item.figures.objects ??= figures.objects;
  if (kind !== "polygons") return blob;
  const [{ polygons, objects }] = JSON.parse(await blob.text()).images;
  item.figures.objects ??= objects ?? null;
  return new Blob([JSON.stringify(polygons)], { type: "application/geo+json" });
}

const ending = (kind) => (kind === "polygons" ? ".geojson" : `-${kind}.png`);
const stem = (path) => path.replace(/(?<=[^/])\.[^./]+$/, "");

export async function saveOne(item, kind) {
  save(await made(item, kind), stem(item.path).split("/").at(-1) + ending(kind));
  item.saved = true;
}

/**
 * A zip with the folders of the images, and results.csv with a row for every image, so that what
 * failed is not silently missing.
 *
 * @param items all of them; those that are done go in
 * @param progress told how many of how many are there
 * @returns how many could not be made now
 */
export async function saveAll(items, kind, progress) {
  const wanted = items.filter((item) => item.state === "done");
  const names = uniqueNames(wanted, ending(kind));
  const files = new Map();
  const errors = new Map(items.filter((item) => item.state === "failed").map((item) => [item, item.error]));
  const missing = errors.size;
  const queue = [...wanted];
  const takeTurns = async () => {
    for (let item = queue.shift(); item; item = queue.shift()) {
      try {
        files.set(item, await made(item, kind));
      } catch (error) {
        errors.set(item, error.message);
      }
      progress(files.size + errors.size - missing, wanted.length);
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, takeTurns));
  const there = wanted.filter((item) => files.has(item));
  const entries = there.map((item) => [names.get(item), files.get(item)]);
  const results = new Blob([table(items, names, errors)], { type: "text/csv" });
  save(await zip([...entries, ["results.csv", results]]), `${kind === "mask" ? "masks" : kind}.zip`);
  for (const item of there) item.saved = true;
  return errors.size - missing;
}

/** A path for each item; equal ones get a number. Case is no difference to Windows and macOS. */
function uniqueNames(items, end) {
  const taken = new Set();
  const names = new Map();
  for (const item of items) {
    let name = stem(item.path) + end;
    for (let n = 2; taken.has(name.toLowerCase()); n += 1) name = `${stem(item.path)}-${n}${end}`;
    taken.add(name.toLowerCase());
    names.set(item, name);
  }
  return names;
}

function table(items, names, errors) {
  const rows = [["image", "file", "model", "threshold", "foreground", "confidence", "objects", "error"]];
  for (const item of items) {
    const error = errors.get(item) || (item.state === "done" ? "" : "not done yet");
    const { model, foreground, confidence, objects } = item.state === "done" ? item.figures : {};
    const file = error ? "" : names.get(item);
    rows.push([item.path, file, model || item.model, item.threshold, foreground, confidence, objects, error]);
  }
  const text = rows.map((row) => row.map(cell).join(",")).join("\r\n");
  // by this sign Excel knows UTF-8; where all is ASCII nobody needs it, and some programs trip over it
  return `${/[^\x00-\x7f]/.test(text) ? "\ufeff" : ""}${text}\r\n`;
}

/** RFC 4180. */
function cell(value) {
  const text = String(value ?? "");
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
