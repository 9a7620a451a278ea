// Model, threshold, page and channel: of the shown image, and of those that are added next.

import * as connection from "./connection.js";
import { add, items, rerun } from "./items.js";
import * as models from "./models.js";
import * as viewer from "./viewer.js";

const $ = (id) => document.getElementById(id);
const RERUN_DELAY_MS = 350; // an arrow key held down must not send a request for each step

let next = { model: "", threshold: "" }; // of images that are added; "" is the service's default
let timer = 0;

export const forNewImages = () => ({ ...next });

/** Put the controls into the panel, or into the drop zone while there are no images. */
export function place(working) {
  const parent = $(working ? "settings-after" : "settings-before");
  if ($("settings").parentElement !== parent) parent.append($("settings"));
}

const shownSettings = () => viewer.current()?.settings || next;

export function render() {
  const settings = shownSettings();
  const model = models.findModel(settings.model);
  if (!model) return;
  if ($("model").value !== model.name) $("model").value = model.name;
  const hasThreshold = model.threshold !== undefined && (model.classes || []).length <= 2;
  $("threshold-row").hidden = !hasThreshold;
  if (!timer && document.activeElement !== $("threshold")) $("threshold").value = settings.threshold || model.threshold || 0.5;
  renderThreshold();
  $("threshold-reset").hidden = !hasThreshold || !settings.threshold;
  const current = viewer.current();
  const others = current ? items.filter((item) => item !== current && !sameSettings(item, current)) : [];
  $("apply-all").hidden = !others.length;
  $("apply-all").textContent = `Apply to all ${items.length}`;
}

function renderThreshold() {
  const own = models.findModel(shownSettings().model)?.threshold;
  const value = Number($("threshold").value);
  $("threshold-value").textContent = value.toFixed(2);
  $("threshold-hint").textContent = value === own ? "The model's own." : value < own ? "Finds more, also false ones." : "Finds less, only what is certain.";
  $("threshold-hint").hidden = $("threshold-row").hidden;
}

const sameSettings = (a, b) => ["model", "threshold"].every((name) => (a.settings[name] || "") === (b.settings[name] || "")) && sameChannel(a, b);
const sameChannel = (a, b) => !a.choices?.channel || a.choices.channel !== b.choices?.channel || a.settings.channel === b.settings.channel;

/** Change the settings of the shown image, which is run again, and of those that are added next. */
function change(settings) {
  next = { ...next, ...settings };
  const item = viewer.current();
  if (item) rerun([item], settings);
  render();
}

$("model").addEventListener("change", () => change({ model: $("model").value, threshold: "" }));

$("threshold").addEventListener("input", () => {
  renderThreshold();
  if (viewer.current()?.outputs) viewer.previewThreshold(Number($("threshold").value));
});
$("threshold").addEventListener("change", () => {
  clearTimeout(timer);
  timer = setTimeout(() => {
    timer = 0;
    const own = models.findModel(shownSettings().model)?.threshold;
    const value = Number($("threshold").value);
    change({ threshold: value === own ? "" : String(value) });
  }, RERUN_DELAY_MS);
});
$("threshold-reset").addEventListener("click", () => {
  change({ threshold: "" });
  $("threshold").focus();
  $("threshold").value = models.findModel(shownSettings().model).threshold;
  renderThreshold();
});

$("apply-all").addEventListener("click", () => {
  const current = viewer.current();
  const { model, threshold, channel } = current.settings;
  for (const item of items.filter((each) => each !== current && !sameSettings(each, current))) {
    rerun([item], { model, threshold, ...(item.choices?.channel === current.choices?.channel ? { channel } : {}) });
  }
  $("model").focus();
});

for (const name of ["page", "channel"]) {
  $(name).addEventListener("change", () => rerun([viewer.current()], { [name]: Number($(name).value) }));
}
$("all-pages").addEventListener("click", () => {
  const { file, path, settings, choices } = viewer.current();
  const pages = Array.from({ length: choices.page }, (_, page) => page).filter((page) => page !== settings.page);
  const taken = (page) => items.some((item) => item.file === file && item.settings.page === page);
  const added = pages.filter((page) => !taken(page)).map((page) => ({ file, path, choices, settings: { page } }));
  if (added.length) add(added, settings);
  viewer.current().button.focus();
});

// --- the list of models -----------------------------------------------------------------------------

function renderModels() {
  $("model").replaceChildren(...models.selectable().map((model) => new Option(models.titleOf(model), model.name)));
  $("models").hidden = models.selectable().length < 2;
  render();
}

async function loadModels() {
  try {
    await models.load();
    renderModels();
    connection.setListFailed(false);
    if (models.areLoading()) setTimeout(loadModels, 1000);
  } catch {
    connection.setListFailed(true);
    setTimeout(loadModels, 5000); // the service may be starting
  }
}

export function start() {
  place(false);
  loadModels();
  connection.start(loadModels);
}
