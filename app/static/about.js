// The dialog about the models: what each finds, how good it is, and its details.

import * as models from "./models.js";

const $ = (id) => document.getElementById(id);

const element = (name, text) => Object.assign(document.createElement(name), { textContent: text });

function describe(model) {
  const section = document.createElement("section");
  section.append(element("h3", models.titleOf(model)));
  const { metrics = {} } = model;
  const quality = [];
  if (metrics.images) quality.push(`Measured on ${metrics.images} images that it was not trained on:`);
  if (metrics.found) quality.push(`it found ${metrics.found} objects where ${metrics.true} are;`);
  if (metrics.dice) quality.push(`its masks agree to ${(100 * metrics.dice).toFixed(0)} % with those drawn by people (mean Dice).`);
  section.append(element("p", quality.join(" ")));
  const details = document.createElement("details");
  details.append(element("summary", "Details"));
  const facts = [
    ["Model", model.id],
    ["Engine", [model.device, model.precision].filter(Boolean).join(", ")],
    ["Threshold", model.threshold],
    ["Data", model.data],
    ["Licence", model.licence],
  ].filter(([, value]) => value);
  const list = document.createElement("dl");
  for (const [term, value] of facts) list.append(element("dt", term), element("dd", value));
  details.append(list);
  section.append(details);
  return section;
}

export function start() {
  $("about-open").addEventListener("click", () => {
    $("about-models").replaceChildren(...models.selectable().filter((model) => model.ready).map(describe));
    $("about").showModal();
  });
}
