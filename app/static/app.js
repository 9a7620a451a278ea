// The page's entry point: it connects the controls to the modules below. No dependencies, no build step.
//
//   files.js     reads what was dropped or chosen
//   items.js     the images and their queue
//   service.js   sends images to the service        key.js      asks for the API key
//   imaging.js   decodes images and paints masks
//   strip.js     thumbnails                         viewer.js   the selected image
//   results.js   downloads                          zip.js      the zip format

import * as files from "./files.js";
import { add, clear, inState, items, onChange, rerun } from "./items.js";
import { saveAll, saveOne } from "./results.js";
import { fetchWithKey } from "./service.js";
import * as viewer from "./viewer.js";

const $ = (id) => document.getElementById(id);

// --- adding images ---------------------------------------------------------------------------

function addFiles(found, unreadable = 0) {
  const { images, skipped } = files.filterImages(found);
  const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
  const parts = [];
  if (skipped) parts.push(`${count(skipped, "other file")} skipped`);
  if (unreadable) parts.push(`${count(unreadable, "file")} could not be read`);
  if (!images.length) parts.unshift("No images found");
  else if (parts.length) parts.unshift(count(images.length, "image"));
  showNotice(parts.join("; "));
  if (images.length) add(images, readSettings());
}

for (const input of [$("files"), $("folder")]) {
  input.addEventListener("change", () => {
    addFiles(files.fromList(input.files));
    input.value = ""; // otherwise choosing the same file again fires no event
  });
}
for (const button of document.querySelectorAll("[data-sample]")) {
  button.addEventListener("click", async () => {
    const url = button.dataset.sample;
    try {
      const file = new File([await (await fetch(url)).blob()], url.split("/").at(-1));
      add([{ file, path: file.name, sample: true }], readSettings());
    } catch {
      showNotice("The server cannot be reached.");
    }
  });
}
addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").classList.remove("over");
});
addEventListener("drop", async (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  const { files: found, unreadable } = await files.fromDrop(event.dataTransfer);
  addFiles(found, unreadable);
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) addFiles(files.fromList(event.clipboardData.files));
});

// --- model and threshold ---------------------------------------------------------------------

let models = []; // as /models returns them
let chosenModel = null; // kept here, because the list is rebuilt while models load

function readSettings() {
  const threshold = $("threshold").value;
  return { model: $("model").value, threshold: threshold && String(Math.min(1, Math.max(0, threshold))) };
}

function renderModels() {
  const defaultModel = models.find((model) => model.default);
  const selectable = models.filter((model) => model.ready || model === defaultModel);
  const classes = (model) => model.classes.slice(1).join(", "); // the first is the background
  const label = (model) => `${model.name} (${model.classes ? `detects: ${classes(model)}` : "loading…"})`;
  $("model").replaceChildren(...selectable.map((model) => new Option(label(model), model.name)));
  const chosen = selectable.find((model) => model.name === chosenModel) || defaultModel;
  $("model").value = chosen.name;
  $("models").hidden = selectable.length < 2;
  $("service").textContent = defaultModel.ready
    ? `Detects: ${classes(defaultModel)} · model ${defaultModel.id} on ${defaultModel.device}`
    : `Model ${defaultModel.name} is loading…`;
  renderDefaultThreshold();
}

function renderDefaultThreshold() {
  const model = models.find((each) => each.name === $("model").value);
  $("threshold").placeholder = model?.threshold === undefined ? "default" : `default ${model.threshold}`;
}

async function loadModels() {
  try {
    models = (await (await fetchWithKey("models")).json()).models;
    renderModels();
    if (models.some((model) => !model.ready && !model.error)) setTimeout(loadModels, 1000);
  } catch {
    $("service").textContent = "The list of models is not available.";
    setTimeout(loadModels, 5000); // the service may be starting
  }
}

$("model").addEventListener("change", () => {
  chosenModel = $("model").value;
  renderDefaultThreshold();
});
$("threshold").addEventListener("change", () => {
  $("threshold").value = readSettings().threshold;
});

// --- actions on all images -------------------------------------------------------------------

const hasUnsavedMasks = () => items.some((item) => item.state === "done" && !item.saved && !item.sample);

$("retry").addEventListener("click", () => rerun(inState("failed")));
$("again").addEventListener("click", () => rerun(items, readSettings()));
$("clear").addEventListener("click", () => {
  if (hasUnsavedMasks() && !confirm("Some masks have not been downloaded. Remove everything?")) return;
  showNotice("");
  clear();
});
addEventListener("beforeunload", (event) => {
  if (hasUnsavedMasks()) event.preventDefault(); // the browser asks for confirmation
});

// --- downloads -------------------------------------------------------------------------------

let downloading = false;

/** Run one download at a time. An error goes to the notice, which progress does not overwrite. */
async function runDownload(download) {
  downloading = true;
  showNotice("");
  render();
  try {
    await download();
  } catch (error) {
    showNotice(`Download failed: ${error.message}`);
  }
  downloading = false;
  viewer.refresh(); // the download may have returned the number of objects
  render();
}

$("download").addEventListener("click", () =>
  runDownload(() => saveOne(viewer.current(), $("kind").value)),
);
$("download-all").addEventListener("click", () =>
  runDownload(async () => {
    const onProgress = (finished, total) =>
      showNotice(finished < total ? `Preparing ${finished} of ${total}…` : "");
    const failures = await saveAll([...items], $("kind").value, onProgress);
    if (failures) showNotice(`${failures} failed; results.csv in the zip gives the reasons.`);
  }),
);

// --- messages --------------------------------------------------------------------------------

/** Show the result of the user's last action until the next one; "" hides it. */
function showNotice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

/** Update the progress text and the buttons. */
function render() {
  const [done, failed] = [inState("done").length, inState("failed").length];
  const pending = items.length - done - failed;
  const parts = [];
  if (pending) parts.push(`${pending} pending`);
  if (done) parts.push(`${done} done`);
  if (failed) parts.push(`${failed} failed`);
  const reason = items.find((item) => item.waitReason)?.waitReason;
  const retrying = reason ? ` · ${reason.replace(/\.?$/, "; retrying…")}` : "";
  $("status").textContent = parts.join(", ") + retrying;
  $("work").hidden = $("actions").hidden = !items.length;
  $("retry").hidden = !failed;
  $("again").hidden = !(done + failed);
  $("kind").disabled = !done || downloading;
  $("download").disabled = viewer.current()?.state !== "done" || downloading;
  $("download-all").disabled = downloading;
  $("download-all").hidden = items.length < 2 || !done;
}

onChange(render);
$("curl").textContent = `curl -F file=@image.png ${new URL("segment", document.baseURI)} -o mask.png`;
loadModels();
