// The line in the header: whether the server can be used, and what its model finds. Requests of the queue show that;
// while none is sent, a probe does.

import * as models from "./models.js";
import { REASONS, pauseKind } from "./queue.js";
import { findTrouble } from "./service.js";

const CHECK_MS = 10_000;
const RECHECK_MS = 3_000; // while the server cannot be used

const line = document.getElementById("service");
let trouble = ""; // of the last probe: a key of REASONS, or ""
let listFailed = false;
let timer = 0;
let onReturn = () => {};

export function render() {
  const own = models.defaultModel();
  const kind = pauseKind() || trouble;
  const isLoading = own && !own.ready && kind !== "away";
  let text = REASONS[kind];
  if (isLoading) text = `Loading the model ${own.name}…`;
  else if (!kind && own) text = `Ready. Finds ${models.findsOf(own)}.`;
  else if (!kind) text = listFailed ? "The list of models is not available." : "Connecting…";
  if (line.textContent !== text) line.textContent = text; // screen readers say every change
  line.classList.toggle("trouble", Boolean(kind) && !isLoading);
}

/** Say whether the list of models could be fetched. */
export function setListFailed(failed) {
  listFailed = failed;
  render();
}

/** Probe the server now, and from time to time while the page is visible. */
export async function check() {
  const before = trouble;
  if (!document.hidden) trouble = await findTrouble();
  clearTimeout(timer);
  timer = setTimeout(check, trouble ? RECHECK_MS : CHECK_MS);
  render();
  if (before && !trouble) onReturn();
}

/** Follow the state of the server. `listener` is called when it can be used again: it may have other models now. */
export function start(listener) {
  onReturn = listener;
  document.addEventListener("visibilitychange", check);
  for (const name of ["online", "offline"]) addEventListener(name, check);
  render();
  check();
}
