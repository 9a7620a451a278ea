// The models of the service, in the page's words.

import { fetchWithKey } from "./service.js";

let models = []; // as /models returns them

const TITLES = { nuclei: "Cell nuclei (microscopy)", person: "People (photographs)" };
const FINDS = { nuclei: "cell nuclei", person: "people" };

const foregroundOf = (model) => (model.classes || []).slice(1); // the first class is the background
export const titleOf = (model) => TITLES[model.name] || `${model.name} (${foregroundOf(model).join(", ") || "loading…"})`;
export const findsOf = (model) => FINDS[model.name] || foregroundOf(model).join(", ");

export const defaultModel = () => models.find((model) => model.default);
export const findModel = (name) => models.find((model) => model.name === name) || defaultModel();
export const selectable = () => models.filter((model) => model.ready || model.default);
export const areLoading = () => models.some((model) => !model.ready && !model.error);

/** Whether an item's model has several classes; such a model has no threshold. */
export const isMultiClass = (item) => (findModel(item.settings.model)?.classes || []).length > 2;

/** The threshold that an item's mask was made with: its own or the model's. */
export const thresholdOf = (item) => item.settings.threshold || findModel(item.settings.model)?.threshold;

/** The classes that an item's objects may have, in the order of their indices from 1. */
export function classesOf(item) {
  const model = findModel(item.settings.model);
  return [...new Set([...(model ? foregroundOf(model) : []), ...item.table.classes])];
}

/** Fetch the list. Throws if the service does not respond with one. */
export async function load() {
  ({ models } = await (await fetchWithKey("models")).json());
}
