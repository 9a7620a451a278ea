// The strip of thumbnails: one stop of the Tab key, and arrow keys inside. Knows items by their path,
// their state and what is hung on them here: thumbnail and button.

import { canvasOf } from "./pictures.js";

const strip = document.getElementById("strip");
const SIDE = 156;

export function add(item, choose) {
  const [folder, name] = /(?:([^/]*)\/)?([^/]*)$/.exec(item.path).slice(1);
  const button = document.createElement("button");
  item.thumbnail = canvasOf(SIDE, SIDE);
  item.button = button;
  button.type = "button";
  button.title = item.path;
  button.tabIndex = -1;
  button.append(item.thumbnail, line(name, "file"));
  if (folder) button.append(line(folder, "folder"));
  button.addEventListener("click", choose);
  const entry = document.createElement("li");
  entry.append(button);
  strip.append(entry);
  tell(item);
}

function line(text, className) {
  const span = document.createElement("span");
  span.className = className;
  span.textContent = text;
  return span;
}

export function tell(item) {
  item.button.dataset.state = item.state;
  item.button.setAttribute("aria-label", `${item.path}, ${item.state}`);
}

export function choose(item) {
  for (const button of strip.querySelectorAll("button")) {
    const chosen = button === item.button;
    button.setAttribute("aria-pressed", String(chosen));
    button.tabIndex = chosen ? 0 : -1;
  }
}

export const clear = () => strip.replaceChildren();

strip.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const buttons = [...strip.querySelectorAll("button")];
  const here = buttons.indexOf(event.target.closest("button"));
  const there = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (there === undefined) return;
  event.preventDefault(); // the strip would scroll by itself
  buttons[there]?.focus();
  buttons[there]?.click();
});
