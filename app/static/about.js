// The dialog about the models: what each finds, how good it is, and its details.

import * as models from "./models.js";

/** Captions of examples on images the model was not trained on. The pictures are drawn by docs/pictures/examples.py. */
const EXAMPLES = {
  nuclei: {
    good: ["Fluorescence", "Stained tissue (H&E)", "Drawn nuclei"],
    bad: ["Brown stain (immunohistochemistry): misses most nuclei inside glands", "Coins: takes them for nuclei"],
  },
  person: {
    good: ["A person from the waist up", "Head and shoulders", "Black and white"],
    bad: ["Black and white, from the side: misses part of the person, marks grass", "A cat: takes it for a person"],
  },
};

const $ = (id) => document.getElementById(id);

const element = (name, text) => Object.assign(document.createElement(name), { textContent: text });

function describe(model) {
  const section = document.createElement("section");
  section.append(element("h3", models.titleOf(model)));
  const { metrics = {} } = model;
  const quality = [];
  if (metrics.images) quality.push(`Measured on ${metrics.images} images that it was not trained on:`);
  if (metrics.found) quality.push(`${sayCounted(metrics)}it found ${metrics.found} objects where ${metrics.true} are;`);
  if (metrics.dice) quality.push(`its masks agree to ${(100 * metrics.dice).toFixed(0)}% with those drawn by people (mean Dice).`);
  section.append(element("p", quality.join(" ")));
  for (const [kind, captions] of Object.entries(EXAMPLES[model.name] || {})) {
    section.append(element("h4", kind === "good" ? "Works" : "Does not work"), listExamples(model.name, kind, captions));
  }
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

/** Begins the sentence about objects where they were not counted on all images: some sources have no labels of objects. */
function sayCounted({ images, by_source: sources = {} }) {
  const counted = Object.values(sources).filter((source) => source.found != null);
  const number = counted.reduce((sum, source) => sum + source.images, 0);
  return counted.length && number < images ? `on ${number} of them ` : "";
}

/** Pictures with the image on the left and the result on the right. */
function listExamples(name, kind, captions) {
  const list = document.createElement("ul");
  list.className = "examples";
  captions.forEach((caption, index) => {
    const entry = document.createElement("li");
    const picture = new Image(320, 160);
    picture.src = `static/samples/examples/${name}-${kind}-${index + 1}.webp`;
    picture.alt = "";
    entry.append(picture, element("span", caption));
    list.append(entry);
  });
  return list;
}

export function start() {
  $("about-open").addEventListener("click", () => {
    $("about-models").replaceChildren(...models.selectable().filter((model) => model.ready).map(describe));
    $("about").showModal();
  });
}
