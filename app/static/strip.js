// The strip of thumbnails. It is one tab stop; arrow keys move inside it. Uses an item's path and state,
// and adds its thumbnail and button.

import { createCanvas } from "./imaging.js";

const strip = document.getElementById("strip");
const SIDE = 156; // pixels: twice the size on the page, for screens of high density

export function add(item, onSelect) {
  const [folder, name] = /(?:([^/]*)\/)?([^/]*)$/.exec(item.path).slice(1);
  const button = document.createElement("button");
  item.thumbnail = createCanvas(SIDE, SIDE);
  item.button = button;
  button.type = "button";
  button.title = item.path;
  button.tabIndex = -1;
  button.append(item.thumbnail, createLabel(name, "file"));
  if (folder) button.append(createLabel(folder, "folder"));
  button.addEventListener("click", onSelect);
  const entry = document.createElement("li");
  entry.append(button);
  strip.append(entry);
  render(item);
}

function createLabel(text, className) {
  const span = document.createElement("span");
  span.className = className;
  span.textContent = text;
  return span;
}

export function render(item) {
  item.button.dataset.state = item.state;
  item.button.setAttribute("aria-label", `${item.path}, ${item.state}`);
}

export function select(item) {
  for (const button of strip.querySelectorAll("button")) {
    const selected = button === item.button;
    button.setAttribute("aria-pressed", String(selected));
    button.tabIndex = selected ? 0 : -1;
  }
}

export const clear = () => strip.replaceChildren();

strip.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const buttons = [...strip.querySelectorAll("button")];
  const current = buttons.indexOf(event.target.closest("button"));
  const target = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (target === undefined) return;
  event.preventDefault(); // the keys would also scroll the strip
  buttons[target]?.focus();
  buttons[target]?.click();
});
