// The bar, the time left, and what screen readers hear of it.

import { pauseReason } from "./queue.js";

const $ = (id) => document.getElementById(id);
const ANNOUNCE_MS = 10_000; // between two announcements of progress
const ANNOUNCE_TOGETHER_MS = 50;

let batch = null; // {started, done, total, announced} while images are pending
let lastPending = 0;
let preparing = null; // {finished, total} of a download
let preparingSince = 0;

let unsaid = []; // texts for the next announcement

/** Let screen readers say a text. Texts that come together are one announcement, or the last would hide the others. */
export function announce(text) {
  if (!text || unsaid.includes(text)) return;
  unsaid.push(text);
  if (unsaid.length > 1) return;
  if ($("announcer").textContent === text) $("announcer").textContent = ""; // otherwise the same text would not change it
  setTimeout(() => {
    $("announcer").textContent = unsaid.join(" ");
    unsaid = [];
  }, ANNOUNCE_TOGETHER_MS);
}

/** Show the progress of a download; null when it has ended. */
export function showPreparing(state) {
  if (state && !preparing) preparingSince = Date.now();
  preparing = state;
  renderBar("");
}

/** Call `update` every second, so that the time left is right. */
export const keepUpToDate = (update) => setInterval(() => (batch || preparing || pauseReason()) && update(), 1000);

let summary = "";

export function render(items, pending) {
  if (pending.length && !batch) batch = { started: Date.now(), done: 0, total: 0, announced: 0 };
  if (batch) {
    if (pending.length > lastPending) batch.total += pending.length - lastPending;
    else batch.done += lastPending - pending.length;
  }
  lastPending = pending.length;
  summary = summarize(items);
  if (batch && !pending.length) {
    batch = null;
    announce(items.length ? `Finished: ${summary}.` : "");
  }
  if (batch && Date.now() - batch.announced > ANNOUNCE_MS) {
    announce(batch.announced ? describe(batch.done, batch.total, batch.started) : `Started: ${batch.total} to do.`);
    batch.announced = Date.now();
  }
  renderBar();
}

function summarize(items) {
  const count = (state) => items.filter((item) => item.state === state).length;
  return ["done", "failed", "stopped"].flatMap((state) => (count(state) ? [`${count(state)} ${state}`] : [])).join(", ");
}

function describe(done, total, since) {
  const seconds = ((Date.now() - since) / 1000 / done) * (total - done);
  const left = seconds < 90 ? `${Math.max(1, Math.round(seconds))} s` : `${Math.round(seconds / 60)} min`;
  return `${done} of ${total}${done && done < total && !pauseReason() ? `, about ${left} left` : ""}`;
}

function renderBar() {
  const active = batch || preparing;
  $("progress").hidden = !active && !summary;
  $("bar").hidden = !active;
  const waiting = active ? pauseReason() : "";
  if (waiting && $("waiting").textContent !== waiting) announce(waiting);
  $("waiting").textContent = waiting;
  $("progress").classList.toggle("paused", Boolean(active && pauseReason()));
  if (batch) {
    $("bar").max = batch.total;
    $("bar").value = batch.done;
    $("status").textContent = describe(batch.done, batch.total, batch.started);
  } else if (preparing) {
    $("bar").max = preparing.total;
    $("bar").value = preparing.finished;
    $("status").textContent = `Preparing ${describe(preparing.finished, preparing.total, preparingSince)}`;
  } else {
    $("status").textContent = summary;
  }
}
