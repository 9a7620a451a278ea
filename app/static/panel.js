// The panel beside the picture: name, count, notes, the histogram, the filter and the table of objects.

import {
  describeArea, describeCount, filter, isFiltering, isFilteringAreas, keptCount, keptObjects, lacksPixelSize, measure,
  pixelSizeOf, scale,
} from "./objects.js";
import { thresholdOf } from "./models.js";
import { describeName, selectionOf } from "./names.js";
import * as viewer from "./viewer.js";

const $ = (id) => document.getElementById(id);
const MAX_ROWS = 250; // a table of thousands of rows makes the page slow
const BINS = 28;
const UNFINISHED = { waiting: "Waiting", working: "Working", stopped: "Stopped" };

let order = { name: "id", descending: false };
let onFilter = () => {}; // called when objects were filtered, deleted or restored: with the item, or null for all

export function listen(listener) {
  onFilter = listener;
}

const element = (name, text, attributes = {}) => {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};

// --- text -------------------------------------------------------------------------------------------

/** Show the text about the selected item. `layers` is {empty, failed}: what the viewer could decode. */
export function renderText(item, layers) {
  const finished = item.state === "failed" || item.state === "done";
  $("stage").classList.toggle("blank", finished && (layers.empty || item.state === "failed"));
  $("name").textContent = describeName(item);
  $("name").title = describeName(item);
  $("error").hidden = item.state !== "failed";
  $("error").textContent = item.error || "";
  $("rerun").hidden = !["failed", "stopped"].includes(item.state);
  $("rerun").textContent = item.state === "stopped" ? "Resume" : "Retry";
  const note = layers.failed && item.outputs ? "Your browser cannot draw this image. Its files can be downloaded." : item.note;
  $("note").hidden = !note || item.state === "failed";
  $("note").textContent = note || "";
  $("unlike").hidden = !(item.state === "done" && item.unlike);
  $("unlike").textContent = item.unlike || "";
  renderChoices(item);
  renderFacts(item);
  renderObjects(item);
}

function renderChoices(item) {
  const { pages, channels, frames } = describeChoices(item);
  $("choices").hidden = !(pages || channels || frames || item.cutOff);
  const { page, channel } = selectionOf(item);
  const shown = [pages && `page ${page}`, frames && "the first frame", channels && `channel ${channel}`];
  const number = (count, noun) => count && `${count} ${noun} (0 to ${count - 1})`;
  const has = [number(pages, "pages"), frames && `${frames} frames`, number(channels, "channels")];
  const join = (parts, word) => parts.filter(Boolean).join(word);
  const choose = pages || channels ? " Choose:" : "";
  const texts = [
    item.cutOff && "This file is cut off. Only its first page could be read.",
    shown.some(Boolean) && `This file has ${join(has, " and ")}. Only ${join(shown, ", ")} was used.${choose}`,
  ];
  $("choices-text").textContent = join(texts, " ");
  fillChoice("page", pages, item.settings.page);
  fillChoice("channel", channels, item.settings.channel);
  $("all-pages").hidden = !pages;
}

/** Numbers of pages, channels and frames, if there is more than one. The frames of an animation cannot be chosen. */
function describeChoices({ choices = {}, state, statistics }) {
  const frames = state === "done" && !choices.page && statistics.pages > 1 ? statistics.pages : undefined;
  return { pages: choices.page, channels: choices.channel, frames };
}

function fillChoice(name, count, chosen) {
  $(`${name}-choice`).hidden = !count;
  if (!count) return;
  if ($(name).options.length !== count) {
    $(name).replaceChildren(...Array.from({ length: count }, (_, index) => new Option(index)));
  }
  $(name).value = chosen;
}

/** List the known facts about the item. A fact that is not known has no row. */
function renderFacts(item) {
  const { statistics, size, settings, state } = item;
  const known = state === "done" && statistics ? statistics : {};
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  const seconds = (time) => `${time.toFixed(2)} s`;
  const text = (value) => String(value);
  const rows = [
    ["Size", size, ({ width, height }) => `${width} × ${height} px`],
    ["Covered", known.coverage, percent],
    ["Uncertainty", state === "done" ? item.uncertainty : null, percent],
    ["Pixel size", pixelSizeOf(item), (value) => `${Number(value.toPrecision(4))} µm`],
    ["Time", state === "done" ? item.seconds : null, seconds],
    ["Model time", known.modelSeconds, seconds],
    ["Model", known.model || settings.model, text],
    ["Threshold", thresholdOf(item), text],
    ["Engine", known.engine, text],
  ].filter(([, value]) => value !== null && value !== undefined && value !== "");
  $("facts").replaceChildren(
    ...rows.map(([term, value, format]) => {
      const row = document.createElement("div");
      row.append(element("dt", term), element("dd", format(value)));
      return row;
    }),
  );
}

// --- objects ----------------------------------------------------------------------------------------

export const describeObject = (item, label) => {
  const { table } = item;
  const name = new Set(table.classes).size > 1 ? `${table.classes[label - 1]} ` : "";
  const area = describeArea(table.areas[label - 1], pixelSizeOf(item));
  return `${name}#${label} · ${area} · score ${table.scores[label - 1].toFixed(2)}`;
};

function renderObjects(item) {
  const { table } = item;
  const shown = Boolean(table) && item.state !== "failed";
  $("objects").hidden = !shown;
  $("count").textContent = shown ? describeCount(item) : UNFINISHED[item.state] || "";
  $("description").textContent = shown ? describeImage(item) : `${describeName(item)}, ${item.state}.`;
  if (!shown) return;
  const kept = keptObjects(item);
  const removed = table.count - kept.filter(Boolean).length;
  $("objects-title").textContent = removed ? `Objects: ${table.count - removed} of ${table.count} are kept` : "Objects";
  // an area keeps the unit in which it was typed, whatever image is shown
  if (!isFilteringAreas()) filter.inMicrometers = Boolean(pixelSizeOf(item));
  $("area-unit").textContent = filter.inMicrometers ? "µm²" : "px";
  $("filter-note").hidden = !lacksPixelSize(item) || !table.count;
  $("filter-reset").hidden = !isFiltering();
  $("undelete").hidden = !item.deleted.size;
  $("undelete").textContent = `Restore ${item.deleted.size} deleted`;
  $("hidden-note").textContent = describeHidden(item, removed);
  $("hidden-note").hidden = !$("hidden-note").textContent;
  drawHistogram(item, kept);
  renderTable(item, kept);
  renderObject(item, kept);
}

/** Say why none of the objects is shown, or "". */
function describeHidden(item, removed) {
  const { count } = item.table;
  if (!count || removed < count) return "";
  const objects = count === 1 ? "The only object" : `All ${count.toLocaleString("en")} objects`;
  const verb = count === 1 ? "is" : "are";
  if (!item.deleted.size) return `${objects} ${verb} hidden by the filter.`;
  return `${objects} ${verb} deleted${item.deleted.size < count ? " or hidden by the filter" : ""}.`;
}

/** Show the selected object beside the picture, unless it was removed. */
function renderObject(item, kept) {
  const label = viewer.selectedObject();
  const shown = Boolean(label && kept[label - 1]);
  $("object").hidden = !shown;
  if (shown) $("object-text").textContent = describeObject(item, label);
}

/** Describe what the picture shows, for those who do not see it. */
function describeImage(item) {
  const { table, size } = item;
  const kept = keptObjects(item);
  const areas = Array.from(table.areas).filter((_, index) => kept[index]).sort((a, b) => a - b);
  const parts = [`Image of ${size.width} by ${size.height} pixels with ${describeCount(item)}`];
  if (item.statistics.coverage !== null) parts.push(`${(100 * item.statistics.coverage).toFixed(1)} percent are covered`);
  if (areas.length) {
    const at = (share) => describeArea(Math.round(areas[Math.floor(share * (areas.length - 1))]), pixelSizeOf(item));
    parts.push(`areas from ${at(0)} to ${at(1)}, median ${at(0.5)}`);
  }
  return `${parts.join("; ")}.`;
}

/** Bars of areas on a logarithmic scale; those of removed objects are pale. */
function drawHistogram(item, kept) {
  const canvas = $("histogram");
  const { areas } = item.table;
  canvas.hidden = areas.length < 2;
  if (canvas.hidden) return;
  const ratio = devicePixelRatio || 1;
  const width = (canvas.width = Math.round((canvas.clientWidth || 320) * ratio));
  const height = (canvas.height = Math.round(56 * ratio));
  const logs = Array.from(areas, (area) => Math.log(Math.max(1, area)));
  const low = Math.min(...logs.slice(0, 1e5));
  const high = Math.max(...logs.slice(0, 1e5), low + 0.01);
  const bins = Array.from({ length: BINS }, () => [0, 0]); // kept, removed
  logs.forEach((log, index) => {
    const bin = Math.min(BINS - 1, Math.floor((BINS * (log - low)) / (high - low)));
    bins[bin][kept[index] ? 0 : 1] += 1;
  });
  const most = Math.max(...bins.map(([a, b]) => a + b));
  const context = canvas.getContext("2d");
  const style = getComputedStyle(canvas);
  const base = height - 14 * ratio;
  bins.forEach(([shown, removed], index) => {
    const left = (index * width) / BINS;
    const bar = (count) => (count ? Math.max(ratio, (base * count) / most) : 0);
    context.fillStyle = style.color;
    context.fillRect(left, base - bar(shown), width / BINS - ratio, bar(shown));
    context.globalAlpha = 0.3;
    context.fillRect(left, base - bar(shown) - bar(removed), width / BINS - ratio, bar(removed));
    context.globalAlpha = 1;
  });
  const size = pixelSizeOf(item);
  const label = (log) => describeArea(Math.round(Math.exp(log)), size);
  context.font = `${11 * ratio}px system-ui, sans-serif`;
  context.fillText(label(low), 0, height - 2 * ratio);
  context.textAlign = "center";
  context.fillText("area", width / 2, height - 2 * ratio);
  context.textAlign = "right";
  context.fillText(label(high), width, height - 2 * ratio);
  canvas.setAttribute("aria-label", `Histogram of the areas, from ${label(low)} to ${label(high)}`);
}

/** The columns of the table: name, heading, values, text of a value. */
function tableColumns(item) {
  const { table } = item;
  const size = pixelSizeOf(item);
  const measured = new Map(measure(table, size));
  const ids = Array.from(table.areas, (_, index) => index + 1);
  const unit = size ? "µm²" : "px";
  const area = measured.get(size ? "area_um2" : "area_px") || table.areas;
  const short = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 100 && size ? 1 : 0 });
  const columns = [
    ["id", "#", ids, String],
    ["area", `Area (${unit})`, area, short],
    ["score", "Score", table.scores, (value) => value.toFixed(2)],
  ];
  if (new Set(table.classes).size > 1) columns.splice(1, 0, ["class", "Class", table.classes, String]);
  const intensity = measured.get("mean_intensity_1");
  if (intensity) columns.push(["intensity", "Intensity", intensity, short]);
  return columns;
}

function renderTable(item, kept) {
  const columns = tableColumns(item);
  const chosen = columns.find(([name]) => name === order.name) || columns[0];
  $("table").tHead.rows[0].replaceChildren(
    ...columns.map(([name, heading]) => {
      const cell = element("th", "", { scope: "col" });
      const sorted = name === chosen[0];
      if (sorted) cell.setAttribute("aria-sort", order.descending ? "descending" : "ascending");
      cell.append(element("button", heading + (sorted ? (order.descending ? " ▾" : " ▴") : ""), { type: "button", "data-sort": name }));
      return cell;
    }),
  );
  const indices = kept.flatMap((each, index) => (each ? [index] : []));
  const values = chosen[2];
  const compare = (a, b) => (values[a] > values[b] ? 1 : values[a] < values[b] ? -1 : a - b);
  indices.sort((a, b) => (order.descending ? -compare(a, b) : compare(a, b)));
  const selected = viewer.selectedObject() - 1;
  const rows = indices.slice(0, MAX_ROWS);
  if (selected >= 0 && kept[selected] && !rows.includes(selected)) rows.unshift(selected);
  $("table").tBodies[0].replaceChildren(
    ...rows.map((index) => {
      const row = element("tr", "", { "data-object": index + 1 });
      if (index === selected) row.setAttribute("aria-selected", "true");
      row.append(
        ...columns.map(([name, , of, format]) => {
          if (name !== "id") return element("td", format(of[index]));
          const cell = document.createElement("td");
          cell.append(element("button", format(of[index]), { type: "button", "aria-label": `Object ${index + 1}: show it` }));
          return cell;
        }),
      );
      return row;
    }),
  );
  const hidden = indices.length - Math.min(indices.length, MAX_ROWS);
  $("table-note").textContent = hidden ? `${MAX_ROWS} of ${indices.length.toLocaleString("en")} are listed; sort or filter to see others.` : "";
  $("table-note").hidden = !hidden;
}

/** Show the selected object beside the picture and in the table. */
export function renderSelected(label) {
  const item = viewer.current();
  $("object").hidden = true;
  if (!item?.table) return;
  renderObject(item, keptObjects(item));
  for (const row of $("table").querySelectorAll("[aria-selected]")) row.removeAttribute("aria-selected");
  if (!label) return;
  let row = $("table").querySelector(`[data-object="${label}"]`);
  if (!row) {
    renderTable(item, keptObjects(item));
    row = $("table").querySelector(`[data-object="${label}"]`);
  }
  row?.setAttribute("aria-selected", "true");
  row?.scrollIntoView({ block: "nearest" });
}

export function deleteObject(label) {
  const item = viewer.current();
  if (!keptObjects(item)[label - 1]) return; // the filter hides it
  item.deleted.add(label);
  item.removed = [...(item.removed || []), item.table.boxes[label - 1]];
  item.saved = false;
  viewer.selectObject(0);
  $("stage").focus({ preventScroll: true });
  onFilter(item, `Object ${label} deleted. ${describeCount(item)}.`);
}

$("table").addEventListener("click", (event) => {
  const sort = event.target.closest("[data-sort]")?.dataset.sort;
  const row = event.target.closest("[data-object]");
  if (sort) {
    order = { name: sort, descending: order.name === sort && !order.descending };
    renderTable(viewer.current(), keptObjects(viewer.current()));
    $("table").querySelector(`[data-sort=${sort}]`).focus();
  } else if (row) {
    viewer.selectObject(Number(row.dataset.object), { find: true });
  }
});
$("object-delete").addEventListener("click", () => deleteObject(viewer.selectedObject()));
$("undelete").addEventListener("click", () => {
  const item = viewer.current();
  item.deleted.clear();
  item.removed = null;
  $("stage").focus({ preventScroll: true });
  onFilter(item, `All objects restored. ${describeCount(item)}.`);
});

const readNumber = (id, empty) => ($(id).value === "" || !Number.isFinite($(id).valueAsNumber) ? empty : $(id).valueAsNumber);

function readFilter() {
  filter.minArea = readNumber("min-area", 0);
  filter.maxArea = readNumber("max-area", Infinity);
  filter.minScore = readNumber("min-score", 0);
  filter.excludeEdges = $("exclude-edges").checked;
  const size = readNumber("pixel-size", 0);
  scale.typed = size > 0 ? size : null;
  const item = viewer.current();
  onFilter(null, item?.table ? `${keptCount(item)} of ${item.table.count} are shown.` : "");
}
for (const id of ["min-area", "max-area", "min-score", "exclude-edges", "pixel-size"]) $(id).addEventListener("input", readFilter);
$("filter-reset").addEventListener("click", () => {
  for (const id of ["min-area", "max-area", "min-score"]) $(id).value = "";
  $("exclude-edges").checked = false;
  readFilter();
  $("min-area").focus();
});
