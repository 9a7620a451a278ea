// Whether the model is less sure of an image than of the images that it was tested with. The figures to compare with
// come from the model's card (`unet evaluate --record`), so this knows no model.

import { findModel, findsOf } from "./models.js";

const MARGIN = 1.25; // beyond what 95 % of the test images stay below

/**
 * The probability that a pixel has the wrong class, summed over all pixels, per pixel of the mask; null if unknown.
 * It depends on the threshold, so what an earlier run with the model's own threshold gave is kept for other ones.
 */
export function readUncertainty({ settings, used, uncertainty }, { coverage, confidence }) {
  if (settings.threshold) {
    const same = used && ["model", "page", "channel"].every((name) => (used[name] ?? "") === (settings[name] ?? ""));
    return same ? uncertainty : null;
  }
  return coverage > 0 && confidence !== null ? (1 - confidence) / coverage : null;
}

/** A sentence for the user, or "". */
export function describeUnlike({ table, statistics, settings, uncertainty }) {
  const model = findModel(statistics.model?.split("@")[0] || settings.model);
  if (!table.count) return `Nothing was found.${model ? ` The model finds ${findsOf(model)}.` : ""}`;
  const usual = model?.metrics?.uncertainty?.p95;
  if (!usual || uncertainty == null || uncertainty <= MARGIN * usual) return "";
  const percent = (share) => `${Math.round(100 * share)}%`;
  const found = uncertainty > 1 ? "more pixels to be wrong than it found" : `${percent(uncertainty)} of what it found to be wrong`;
  return (
    `Check this result: the image may be unlike those that the model was trained on. By its own probabilities the ` +
    `model expects ${found}; for the images that it was tested with, less than ${percent(usual)} is usual.`
  );
}
