// results.csv and objects.csv: everything that is needed to repeat a run. Knows no page.

import { thresholdOf } from "./models.js";
import { selectionOf } from "./names.js";
import { filter, isEdited, keptObjects, lacksPixelSize, measure, pixelSizeOf } from "./objects.js";

const RESULT_COLUMNS = [
  "image", "file", "objects", "foreground", "foreground_px", "width", "height", "page", "pages", "channel", "pixel_size_um",
  "model", "threshold", "min_area", "max_area", "min_score", "exclude_edges", "deleted", "engine", "server", "seconds",
  "model_seconds", "date", "uncertainty", "hint", "error",
];

/** A line per image, failed ones too. `names`, `files` and `errors` are maps by item. */
export function formatResults(items, names, files, errors, version) {
  const rows = items.map((item) => {
    const error = errors.get(item) || item.error || ({ done: "", stopped: "stopped" }[item.state] ?? "pending");
    const common = { image: names.get(item), ...selectionOf(item), model: item.settings.model, error };
    if (item.state !== "done") return common;
    return { ...describeRun(item, version), ...common, model: item.statistics.model || item.settings.model, file: error ? "" : files.get(item) };
  });
  return formatCsv([RESULT_COLUMNS, ...rows.map((row) => RESULT_COLUMNS.map((name) => row[name]))]);
}

function describeRun(item, version) {
  const { table, size, statistics } = item;
  const kept = keptObjects(item);
  const area = table.areas.reduce((sum, each, index) => sum + (kept[index] ? each : 0), 0);
  const edited = isEdited(item);
  const coverage = edited ? area / (size.width * size.height) : statistics.coverage;
  const pixels = edited || coverage === null ? area : Math.round(coverage * size.width * size.height);
  const unit = filter.inMicrometers ? "um2" : "px";
  const limit = (value) => (value > 0 && value < Infinity && !lacksPixelSize(item) ? `${value} ${unit}` : "");
  return {
    objects: kept.filter(Boolean).length,
    foreground: coverage === null ? "" : Number(coverage.toFixed(6)),
    foreground_px: pixels,
    width: size.width,
    height: size.height,
    pages: statistics.pages ?? "",
    pixel_size_um: pixelSizeOf(item) || "",
    threshold: thresholdOf(item),
    min_area: limit(filter.minArea),
    max_area: limit(filter.maxArea),
    min_score: filter.minScore || "",
    exclude_edges: filter.excludeEdges ? "true" : "",
    deleted: [...item.deleted].sort((a, b) => a - b).join(" "),
    engine: statistics.engine,
    server: version,
    seconds: item.seconds.toFixed(2),
    model_seconds: statistics.modelSeconds?.toFixed(4) ?? "",
    date: item.date.toISOString(),
    uncertainty: item.uncertainty == null ? "" : Number(item.uncertainty.toFixed(4)),
    hint: item.unlike || "",
  };
}

/**
 * The kept objects of all images, a line each. Columns that an image does not have stay empty. There are columns for
 * the page and the channel where a file has several. `imageNames` is a map by item.
 */
export function formatObjects(items, imageNames) {
  const selections = ["page", "channel"].filter((name) => items.some((item) => name in selectionOf(item)));
  const tables = items.map((item) => [item, new Map(measure(item.table, pixelSizeOf(item)))]);
  const names = [...new Set(tables.flatMap(([, measured]) => [...measured.keys()]))].filter((name) => name !== "score");
  const identify = (item) => [imageNames.get(item), ...selections.map((name) => selectionOf(item)[name])];
  const rows = tables.flatMap(([item, measured]) => objectRows(item, measured, names).map((row) => [...identify(item), ...row]));
  return formatCsv([["image", ...selections, "id", "class", ...names, "score"], ...rows]);
}

/** The kept objects of one image, in the columns of the service's `measurements`. */
export function formatMeasurements(item) {
  const measured = new Map(measure(item.table, pixelSizeOf(item)));
  const names = [...measured.keys()].filter((name) => name !== "score");
  return formatCsv([["id", "class", ...names, "score"], ...objectRows(item, measured, names)]);
}

function objectRows(item, measured, names) {
  const kept = keptObjects(item);
  return kept.flatMap((each, index) => {
    if (!each) return [];
    const values = names.map((name) => (measured.has(name) ? Number(measured.get(name)[index].toPrecision(8)) : ""));
    return [[index + 1, item.table.classes[index], ...values, item.table.scores[index]]];
  });
}

function formatCsv(rows) {
  const text = rows.map((row) => row.map(formatCell).join(",")).join("\r\n");
  // Excel needs the byte order mark to recognize UTF-8. ASCII text goes without, as some programs reject it.
  return `${/[^\x00-\x7f]/.test(text) ? "\ufeff" : ""}${text}\r\n`;
}

/** A CSV field, quoted where necessary (RFC 4180). */
function formatCell(value) {
  const text = String(value ?? "");
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
