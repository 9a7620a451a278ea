// The names of images: for people, in tables and of their files. Pages and channels count from 0 everywhere, as in
// requests. Knows neither the page nor the service.

/**
 * {page, channel}, from 0: those that an item's file has several of. Until a result for other settings arrives, they
 * are those of the result that is shown.
 */
export function selectionOf({ settings, used, outputs, choices = {} }) {
  const shown = outputs ? used : settings;
  const names = ["page", "channel"].filter((name) => choices[name]);
  return Object.fromEntries(names.map((name) => [name, shown[name]]));
}

/** "page 1, channel 0", or "" for a file that has one of each. */
export const describeSelection = (item) => Object.entries(selectionOf(item)).map(([name, value]) => `${name} ${value}`).join(", ");

/** "stack.tif, page 1" */
export const describeName = (item) => [item.path, describeSelection(item)].filter(Boolean).join(", ");

/** The name of each item in tables. Equal names of the same page and channel get a number. */
export function nameImages(items) {
  const counts = new Map();
  const names = items.map((item) => {
    const key = describeName(item);
    counts.set(key, (counts.get(key) || 0) + 1);
    return counts.get(key) > 1 ? `${item.path} (${counts.get(key)})` : item.path;
  });
  return new Map(items.map((item, index) => [item, names[index]]));
}

/** Suffixes of image formats, those of the service (app/api/body/names.py). Another suffix is part of the name. */
const IMAGE_SUFFIX = new RegExp(
  "(?<=[^/])(\\.ome)?\\.(a?png|avif|bmp|btf|dib|gif|hei[cf]|j2[ck]|jfif|jp2|jp[efgx]|jpeg|lsm|ndpi|qptiff|scn|" +
    "stk|svs|tf[28]|tiff?|webp)$",
  "i",
);

/** The path of an item's files without their endings: `stack-page1` for stack.tif. */
export function stemOf(item) {
  const { page } = selectionOf(item);
  return item.path.replace(IMAGE_SUFFIX, "") + (page === undefined ? "" : `-page${page}`);
}

/** Names of devices, which Windows does not allow for a file or folder, whatever the extension. */
const RESERVED = /^(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])(?= *(\.|$))/i;
export const makeSafe = (path) => path.split("/").map((part) => part.replace(RESERVED, "$&_")).join("/");

/**
 * The stem of each item, so that all files have different names and Windows allows them. Equal stems get a number;
 * Windows and macOS ignore case.
 *
 * @param endings of the names of an item's files
 */
export function uniqueStems(items, endings) {
  const used = new Set();
  const stems = new Map();
  for (const item of items) {
    const wanted = stemOf(item);
    const names = (stem) => endings.map((ending) => makeSafe(stem + ending).toLowerCase());
    let stem = wanted;
    for (let n = 2; names(stem).some((name) => used.has(name)); n += 1) stem = `${wanted}-${n}`;
    for (const name of names(stem)) used.add(name);
    stems.set(item, stem);
  }
  return stems;
}
