// The strip of thumbnails. It is one tab stop; arrow keys move inside it. Uses an item's names, state and
// objects, and adds its thumbnail and button.

import { createCanvas } from "./imaging.js";
import { describeName, describeSelection } from "./names.js";
import { describeCount, keptCount } from "./objects.js";

const strip = document.getElementById("strip");
export const SIDE = 156; // pixels: twice the size on the page, for screens of high density

export function add(item, onSelect) {
  const [folder, name] = /(?:([^/]*)\/)?([^/]*)$/.exec(item.path).slice(1);
  const button = document.createElement("button");
  item.thumbnail = createCanvas(SIDE, SIDE);
  item.badge = createLabel("", "count");
  item.selection = createLabel("", "selection");
  item.button = button;
  button.type = "button";
  button.tabIndex = -1;
  button.append(item.thumbnail, item.badge, createLabel(name, "file"), item.selection);
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
  const counted = item.state === "done" && item.table;
  item.button.title = describeName(item);
  item.selection.textContent = describeSelection(item);
  item.button.dataset.state = item.state;
  item.button.dataset.unlike = counted && item.unlike ? "true" : "false";
  item.badge.textContent = counted ? keptCount(item).toLocaleString("en") : "";
  const count = counted ? `, ${describeCount(item)}${item.unlike ? ", check the result" : ""}` : "";
  item.button.setAttribute("aria-label", `${describeName(item)}, ${item.state}${count}`);
}

export function select(item) {
  for (const button of strip.querySelectorAll("button")) {
    const selected = button === item.button;
    button.setAttribute("aria-pressed", String(selected));
    button.tabIndex = selected ? 0 : -1;
  }
  item.button.scrollIntoView({ block: "nearest", inline: "nearest" });
}

export const remove = (item) => item.button.parentElement.remove();
export const clear = () => strip.replaceChildren();

const STEPS = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -Infinity, End: Infinity };

strip.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in STEPS)) return;
  const buttons = [...strip.querySelectorAll("button")];
  const current = buttons.indexOf(event.target.closest("button"));
  event.preventDefault(); // the keys would also scroll the strip
  const target = buttons[Math.min(buttons.length - 1, Math.max(0, current + STEPS[event.key]))];
  target?.focus();
  target?.click();
});
