// The page: images in, masks over them. No dependencies, no build step. This file joins the others:
//
//   files.js     what was dropped     ->  items.js    the images and their queue
//   service.js   asked for masks          key.js      with a key, if it wants one
//   pictures.js  pixels of both           strip.js, viewer.js    where they are seen
//   results.js   what goes out            zip.js

import * as files from "./files.js";
import { add, again, clear, inState, items, onChange } from "./items.js";
import { saveAll, saveOne } from "./results.js";
import { ask } from "./service.js";
import * as viewer from "./viewer.js";

const $ = (id) => document.getElementById(id);

// --- images in -------------------------------------------------------------------------------

function take(found, unread = 0) {
  const { images, others } = files.sift(found);
  const count = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
  const lost = [];
  if (others) lost.push(`${count(others, "other file")} left out`);
  if (unread) lost.push(`${count(unread, "file")} could not be read`);
  if (!images.length) lost.unshift("There is no image among these files");
  else if (lost.length) lost.unshift(count(images.length, "image"));
  note(lost.join("; "));
  if (images.length) add(images, settings());
}

for (const input of [$("files"), $("folder")]) {
  input.addEventListener("change", () => {
    take(files.ofList(input.files));
    input.value = ""; // so that the same file can be chosen again
  });
}
for (const button of document.querySelectorAll("[data-sample]")) {
  button.addEventListener("click", async () => {
    const name = button.dataset.sample;
    try {
      const file = new File([await (await fetch(name)).blob()], name.split("/").at(-1));
      add([{ file, path: file.name, sample: true }], settings());
    } catch {
      note("The service cannot be reached.");
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
  const { files: found, unread } = await files.ofDrop(event.dataTransfer);
  take(found, unread);
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) take(files.ofList(event.clipboardData.files));
});

// --- how they are segmented ------------------------------------------------------------------

let models = []; // as the service describes them
let picked = null; // by somebody: the list below is made anew while models load

function settings() {
  const threshold = $("threshold").value;
  return { model: $("model").value, threshold: threshold && String(Math.min(1, Math.max(0, threshold))) };
}

function offer() {
  const usual = models.find((each) => each.default);
  const offered = models.filter((each) => each.ready || each === usual);
  const finds = ({ classes }) => (classes ? `finds: ${classes.slice(1).join(", ")}` : "loading …");
  $("model").replaceChildren(...offered.map((each) => new Option(`${each.name} (${finds(each)})`, each.name)));
  $("model").value = offered.some((each) => each.name === picked) ? picked : usual.name;
  $("models").hidden = offered.length < 2;
  $("service").textContent = usual.ready
    ? `${finds(usual)} · model ${usual.id} on ${usual.device}`
    : `model ${usual.name} is loading …`;
  tellThreshold();
}

function tellThreshold() {
  const own = models.find((each) => each.name === $("model").value)?.threshold;
  $("threshold").placeholder = own === undefined ? "the model's" : `model's: ${own}`;
}

async function introduce() {
  try {
    models = (await (await ask("models")).json()).models;
    offer();
    if (models.some((each) => !each.ready && !each.error)) setTimeout(introduce, 1000);
  } catch {
    $("service").textContent = "the service does not tell its models";
    setTimeout(introduce, 5000); // it may be about to
  }
}

$("model").addEventListener("change", () => {
  picked = $("model").value;
  tellThreshold();
});
$("threshold").addEventListener("change", () => {
  $("threshold").value = settings().threshold; // from 0 to 1, or empty for the model's own
});

// --- all of them -----------------------------------------------------------------------------

const unsaved = () => items.some((item) => item.state === "done" && !item.saved && !item.sample);

$("retry").addEventListener("click", () => again(inState("failed")));
$("again").addEventListener("click", () => again(items, settings()));
$("clear").addEventListener("click", () => {
  if (unsaved() && !confirm("There are masks that were not downloaded. Remove everything?")) return;
  note("");
  clear();
});
addEventListener("beforeunload", (event) => {
  if (unsaved()) event.preventDefault(); // the browser asks
});

// --- masks out -------------------------------------------------------------------------------

let fetching = false;

/** Run one download at a time, and keep what went wrong where the next mask does not overwrite it. */
async function download(work) {
  fetching = true;
  note("");
  tell();
  try {
    await work();
  } catch (error) {
    note(`The download failed: ${error.message}`);
  }
  fetching = false;
  viewer.refresh(); // the number of objects may be known by now
  tell();
}

$("download").addEventListener("click", () => download(() => saveOne(viewer.current(), $("kind").value)));
$("download-all").addEventListener("click", () =>
  download(async () => {
    const progress = (there, all) => note(there < all ? `Collecting ${there} of ${all} …` : "");
    const missing = await saveAll([...items], $("kind").value, progress);
    if (missing) note(`${missing} could not be made; results.csv in the zip says why.`);
  }),
);

// --- words -----------------------------------------------------------------------------------

/** What somebody's last deed came to; it stays until the next. */
function note(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function tell() {
  const [done, failed] = [inState("done").length, inState("failed").length];
  const left = items.length - done - failed;
  const parts = [];
  if (left) parts.push(`${left} to do`);
  if (done) parts.push(`${done} ${done === 1 ? "mask" : "masks"} made`);
  if (failed) parts.push(`${failed} failed`);
  const waits = items.find((item) => item.waits)?.waits;
  const trying = waits ? ` · ${waits.replace(/\.?$/, "; trying again …")}` : "";
  $("status").textContent = parts.join(", ") + trying;
  $("work").hidden = $("deeds").hidden = !items.length;
  $("retry").hidden = !failed;
  $("again").hidden = !(done + failed);
  const item = viewer.current();
  $("kind").disabled = !done || fetching;
  $("download").disabled = item?.state !== "done" || fetching;
  $("download-all").disabled = fetching;
  $("download-all").hidden = items.length < 2 || !done;
}

onChange(tell);
$("curl").textContent = `curl -F file=@image.png ${new URL("segment", document.baseURI)} -o mask.png`;
introduce();
