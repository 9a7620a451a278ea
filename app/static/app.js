// The page's entry point: it connects the controls to the modules below. No dependencies, no build step.
//
//   files.js     reads what was dropped or chosen
//   items.js     the images                         queue.js     when requests are sent
//   service.js   sends images to the service        key.js       asks for the API key
//   connection.js  the header: whether the server can be used
//   models.js    the models and their names         settings.js  model, threshold, page and channel
//   objects.js   objects, labels and the filter     panel.js     texts, histogram, table
//   viewer.js    zoom, pan, what is under the pointer
//   layers.js    decoded pixels and how they are drawn           paint.js     colors of labels
//   tasks.js     work on whole images, which background.js runs in worker.js
//   imaging.js   decodes images, draws thumbnails   strip.js     thumbnails
//   progress.js  bar, time left, announcements
//   unlike.js    the hint that a result should be checked       doubt.js     uncertainty away from outlines
//   parts.js     why a mask has no objects          names.js     names of images and of their files
//   results.js   downloads                          tables.js    results.csv and objects.csv
//   png.js       PNGs of 8 and 16 bits              zip.js       the zip format

import * as about from "./about.js";
import * as connection from "./connection.js";
import * as files from "./files.js";
import { add, clear, inState, items, objectsChanged, onChange, remove, rerun, stop } from "./items.js";
import { describeName } from "./names.js";
import * as panel from "./panel.js";
import * as progress from "./progress.js";
import { onPause } from "./queue.js";
import { KINDS, saveAll, saveOne } from "./results.js";
import { fetchWithKey } from "./service.js";
import * as settings from "./settings.js";
import * as viewer from "./viewer.js";

const $ = (id) => document.getElementById(id);

// --- adding images ----------------------------------------------------------------------------------

function addFiles(found, unreadable = 0) {
  const { images, skipped } = files.filterImages(found);
  const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
  const parts = [];
  if (skipped) parts.push(`${count(skipped, "other file")} skipped`);
  if (unreadable) parts.push(`${count(unreadable, "file")} could not be read`);
  if (!images.length) parts.unshift("No images found");
  else if (parts.length) parts.unshift(count(images.length, "image"));
  showNotice(parts.join("; "));
  if (images.length) add(images, settings.forNewImages());
}

async function addSample(url) {
  try {
    const file = new File([await (await fetch(url)).blob()], url.split("/").at(-1));
    add([{ file, path: file.name, sample: true }], settings.forNewImages());
  } catch {
    showNotice("The server cannot be reached.");
    connection.check();
  }
}

for (const input of [$("files"), $("folder")]) {
  input.addEventListener("change", () => {
    addFiles(files.fromList(input.files));
    input.value = ""; // otherwise choosing the same file again fires no event
  });
}
for (const button of document.querySelectorAll("[data-sample]")) {
  button.addEventListener("click", () => addSample(button.dataset.sample));
}
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
addEventListener("drop", async (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  const link = event.dataTransfer.getData?.("text/uri-list"); // a picture of a page
  const { files: found, unreadable } = await files.fromDrop(event.dataTransfer);
  const sample = document.querySelector(`[data-sample="${CSS.escape(link?.replace(document.baseURI, "") || "-")}"]`);
  if (sample) addSample(sample.dataset.sample);
  else if (link && !found.length) showNotice("A picture of another page cannot be read. Save it, then drop the file.");
  else addFiles(found, unreadable);
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) addFiles(files.fromList(event.clipboardData.files));
});

// --- the view ---------------------------------------------------------------------------------------

viewer.listen({
  item(layers) {
    panel.renderText(viewer.current(), layers);
    settings.render();
  },
  object(label) {
    panel.renderSelected(label);
    if (label) progress.announce(`Selected: ${panel.describeObject(viewer.current(), label)}.`);
  },
  describe: panel.describeObject,
  remove: panel.deleteObject,
});
panel.listen((item, announcement) => {
  objectsChanged(...(item ? [item] : items));
  viewer.redraw();
  viewer.refresh();
  progress.announce(announcement);
});

for (const button of document.querySelectorAll("[data-shown]")) {
  button.addEventListener("click", () => {
    viewer.look.shown = button.dataset.shown;
    for (const each of document.querySelectorAll("[data-shown]")) each.setAttribute("aria-pressed", String(each === button));
    $("opacity").disabled = !["fill", "outline"].includes(viewer.look.shown);
    viewer.redraw();
  });
}
$("more").addEventListener("click", () => {
  $("more").setAttribute("aria-expanded", String($("more").getAttribute("aria-expanded") === "false"));
});
$("opacity").addEventListener("input", () => {
  viewer.look.opacity = $("opacity").value / 100;
  viewer.redraw();
});
$("colors").addEventListener("change", () => {
  viewer.look.colors = $("colors").value;
  $("color").hidden = viewer.look.colors === "each";
  viewer.redraw();
});
$("color").addEventListener("input", () => {
  viewer.look.color = $("color").value;
  viewer.redraw();
});
$("contrast").addEventListener("change", () => viewer.setContrast($("contrast").checked));
$("wipe").addEventListener("input", () => viewer.setWipe($("wipe").value / 100));
$("zoom-in").addEventListener("click", () => viewer.zoomBy(1.5));
$("zoom-out").addEventListener("click", () => viewer.zoomBy(1 / 1.5));
$("zoom-fit").addEventListener("click", viewer.fit);
$("zoom-one").addEventListener("click", viewer.zoomToOne);
for (const [start, end] of [["pointerdown", "pointerup"], ["keydown", "keyup"]]) {
  const isHold = (event) => start === "pointerdown" || event.key === " " || event.key === "Enter";
  $("hide").addEventListener(start, (event) => isHold(event) && viewer.setHidden(true));
  $("hide").addEventListener(end, (event) => isHold(event) && viewer.setHidden(false));
}
for (const name of ["pointerleave", "blur"]) $("hide").addEventListener(name, () => viewer.setHidden(false));

// --- actions on images ------------------------------------------------------------------------------

const hasUnsavedMasks = () => items.some((item) => item.state === "done" && !item.saved && !item.sample);
const focusSelected = () => (viewer.current()?.button || document.querySelector("label[for=files]").control).focus();

$("retry").addEventListener("click", () => {
  rerun(inState("failed"));
  focusSelected();
});
$("rerun").addEventListener("click", () => {
  rerun([viewer.current()]);
  focusSelected();
});
$("stop").addEventListener("click", () => {
  stopDownload();
  stop();
  if (!$("resume").hidden) $("resume").focus();
  else focusSelected();
});
$("resume").addEventListener("click", () => {
  rerun(inState("stopped"));
  focusSelected();
});
$("remove").addEventListener("click", () => {
  const item = viewer.current();
  const unsaved = item.state === "done" && item.deleted.size && !item.saved;
  if (unsaved && !confirm("Objects of this image were deleted and not downloaded. Remove it?")) return;
  remove(item);
  progress.announce(`${describeName(item)} removed.`);
  focusSelected();
});
$("clear").addEventListener("click", () => {
  if (hasUnsavedMasks() && !confirm("Some results have not been downloaded. Remove everything?")) return;
  showNotice("");
  stopDownload();
  clear();
  progress.announce("All images are removed.");
  $("files").focus();
});
addEventListener("beforeunload", (event) => {
  if (hasUnsavedMasks()) event.preventDefault(); // the browser asks for confirmation
});

// --- downloads --------------------------------------------------------------------------------------

let download = null; // an AbortController while files are prepared

for (const [kind, { title, text }] of Object.entries(KINDS)) {
  const label = document.createElement("label");
  const box = Object.assign(document.createElement("input"), { type: "checkbox", value: kind, checked: kind === "mask" });
  const picture = document.createElement("span");
  picture.className = `kind kind-${kind}`;
  const words = document.createElement("span");
  words.append(Object.assign(document.createElement("b"), { textContent: title }), document.createElement("br"), text);
  label.append(box, picture, words);
  $("kinds").append(label);
  box.addEventListener("change", render);
}
const chosenKinds = () => [...$("kinds").querySelectorAll("input:checked")].map((box) => box.value);
$("choose-outputs").addEventListener("click", () => $("outputs").showModal());

/** The version of the service, for the tables; "" if it cannot be found out now. */
async function fetchVersion() {
  try {
    return (await (await fetchWithKey("v2")).json()).version || "";
  } catch {
    return "";
  }
}

const stopDownload = () => download?.abort();

/** Run one download at a time. An error goes to the notice, which progress does not overwrite. */
async function runDownload(prepare) {
  download = new AbortController();
  const { signal } = download;
  showNotice("");
  render();
  try {
    await prepare(await fetchVersion(), signal);
  } catch (error) {
    showNotice(signal.aborted ? "Download stopped." : `Download failed: ${error.message}`);
  }
  download = null;
  progress.showPreparing(null);
  render();
}

$("download").addEventListener("click", () =>
  runDownload((version) => saveOne(viewer.current(), chosenKinds(), version)),
);
$("download-all").addEventListener("click", () =>
  runDownload(async (version, signal) => {
    const onProgress = (finished, total) => progress.showPreparing({ finished, total });
    const failures = await saveAll([...items], chosenKinds(), version, { onProgress, signal });
    if (failures) showNotice(`${failures} failed; results.csv in the zip gives the reasons.`);
  }),
);

// --- messages ---------------------------------------------------------------------------------------

/** Show the result of the user's last action until the next one; "" hides it. */
function showNotice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
  progress.announce(text);
}

/** Update progress and buttons. */
function render() {
  const [failed, stopped, pending] = [inState("failed"), inState("stopped"), inState("waiting", "working")];
  const ready = inState("done");
  const current = viewer.current();
  const kinds = chosenKinds();
  document.body.classList.toggle("working", items.length > 0);
  $("work").hidden = $("actions").hidden = !items.length;
  settings.place(items.length > 0);
  settings.render();
  progress.render(items, pending);
  $("stop").hidden = !pending.length && !download;
  $("resume").hidden = !stopped.length || pending.length > 0;
  $("retry").hidden = !failed.length;
  $("download").disabled = !ready.includes(current) || !kinds.length || Boolean(download);
  $("download-all").disabled = !kinds.length || Boolean(download);
  $("download-all").hidden = items.length < 2 || !ready.length;
  $("chosen").textContent = kinds.map((kind) => KINDS[kind].title).join(", ") || "No files are chosen.";
}

onChange(render);
onPause(() => {
  connection.check(); // what a request found out is newer than the last probe
  connection.render();
  render();
});
progress.keepUpToDate(() => items.length && render());
$("curl").textContent = `curl -F file=@image.png ${new URL("segment", document.baseURI)} -o mask.png`;
about.start();
settings.start();
