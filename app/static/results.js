// Downloads: one output of one image, or a zip with the outputs of all images and a table.

import { segment } from "./service.js";
import { zip } from "./zip.js";

const CONCURRENCY = 3;

/** The output of the given kind as a blob. All kinds but the mask are requested from the service now. */
async function fetchOutput(item, kind) {
  if (kind === "mask") return item.blob;
  const { blob, statistics } = await segment(item, kind);
  item.statistics.objects ??= statistics.objects;
  return blob;
}

const suffix = (kind) => (kind === "polygons" ? ".geojson" : `-${kind}.png`);
const removeExtension = (path) => path.replace(/(?<=[^/])\.[^./]+$/, "");

export async function saveOne(item, kind) {
  save(await fetchOutput(item, kind), makeSafe(removeExtension(item.path).split("/").at(-1) + suffix(kind)));
  item.saved = true;
}

/**
 * Save a zip that keeps the folder structure. Its results.csv has one row per image, failed ones too.
 *
 * @param items all items; the outputs of those that are done go into the zip
 * @param onProgress called with the number of finished outputs and their total
 * @returns the number of outputs that failed
 */
export async function saveAll(items, kind, onProgress) {
  const done = items.filter((item) => item.state === "done");
  const names = uniqueNames(done, suffix(kind));
  const outputs = new Map();
  const errors = new Map();
  const queue = [...done];
  const fetchQueued = async () => {
    for (let item = queue.shift(); item; item = queue.shift()) {
      try {
        outputs.set(item, await fetchOutput(item, kind));
      } catch (error) {
        errors.set(item, error.message);
      }
      onProgress(outputs.size + errors.size, done.length);
    }
  };
  await Promise.all(Array.from({ length: CONCURRENCY }, fetchQueued));
  const saved = done.filter((item) => outputs.has(item));
  const entries = saved.map((item) => [names.get(item), outputs.get(item)]);
  const results = new Blob([formatTable(items, names, errors)], { type: "text/csv" });
  save(await zip([...entries, ["results.csv", results]]), `${kind === "mask" ? "masks" : kind}.zip`);
  for (const item of saved) item.saved = true;
  return errors.size;
}

/** Names of devices, which Windows does not allow for a file or folder, whatever the extension. */
const RESERVED = /^(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])(?= *(\.|$))/i;
const makeSafe = (path) => path.split("/").map((part) => part.replace(RESERVED, "$&_")).join("/");

/** A path per item that Windows allows. Equal paths get a number; Windows and macOS ignore case. */
function uniqueNames(items, end) {
  const used = new Set();
  const names = new Map();
  for (const item of items) {
    const stem = removeExtension(item.path);
    let name = makeSafe(stem + end);
    for (let n = 2; used.has(name.toLowerCase()); n += 1) name = makeSafe(`${stem}-${n}${end}`);
    used.add(name.toLowerCase());
    names.set(item, name);
  }
  return names;
}

function formatTable(items, names, errors) {
  const rows = [["image", "file", "model", "threshold", "foreground", "confidence", "objects", "error"]];
  for (const item of items) {
    const done = item.state === "done";
    const error = errors.get(item) || item.error || (done ? "" : "pending");
    const { model, foreground, confidence, objects } = done ? item.statistics : {};
    const file = error ? "" : names.get(item);
    rows.push([item.path, file, model || item.model, item.threshold, foreground, confidence, objects, error]);
  }
  const text = rows.map((row) => row.map(formatCell).join(",")).join("\r\n");
  // Excel needs the byte order mark to recognise UTF-8. ASCII text goes without, as some programs reject it.
  return `${/[^\x00-\x7f]/.test(text) ? "\ufeff" : ""}${text}\r\n`;
}

/** A CSV field, quoted where necessary (RFC 4180). */
function formatCell(value) {
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
