// Whether the model is less sure of an image than of the images that it was tested with.

import { run } from "./background.js";
import { findModel, findsOf } from "./models.js";
import { MIN_PIXELS } from "./parts.js";

const MARGIN = 1.25; // beyond what 95 % of the test images stay below, as the model's card says

/** The doubt from which results are poor, of models whose test images were measured (docs/decisions/0051). */
const DOUBT_LIMITS = { "nuclei@fe91f4579414": 0.055 };

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

/** The part of the uncertainty that is away from outlines, see doubt.js; null if unknown, or for a model without a limit. */
export async function readDoubt({ probability }, { model }) {
  if (!DOUBT_LIMITS[model]) return null;
  return run("measureDoubt", probability, findModel(nameOf(model)).threshold).catch(() => null); // may lack the memory
}

const nameOf = (model) => model?.split("@")[0];
const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)}%`;

/** A sentence for the user, or "". */
export function describeUnlike({ table, size, parts, statistics, settings, uncertainty, doubt }) {
  const model = findModel(nameOf(statistics.model) || settings.model);
  if (!table.count) return describeNoObjects(parts, size, model);
  const check = "Check this result: the image may be unlike those that the model was trained on.";
  const usual = model?.metrics?.uncertainty?.p95;
  if (usual && uncertainty > MARGIN * usual) {
    const found = uncertainty > 1 ? "more pixels to be wrong than it found" : `${percent(uncertainty)} of what it found to be wrong`;
    const tested = `for the images that it was tested with, less than ${percent(usual)} is usual`;
    return `${check} By its own probabilities the model expects ${found}; ${tested}.`;
  }
  const limit = DOUBT_LIMITS[statistics.model];
  if (!(doubt > limit)) return "";
  const usually = `less than ${percent(limit, 1)} is usual`;
  return `${check} Away from outlines the model expects ${percent(doubt, 1)} of what it found to be wrong; ${usually}.`;
}

/** Say why an image has no objects: the mask is empty, or none of its parts counts as one. */
function describeNoObjects(parts, { width, height }, model) {
  const finds = model ? ` The model finds ${findsOf(model)}.` : "";
  if (!parts) return `No object was found.${finds}`;
  const { pixels, large } = parts;
  if (!pixels) return `Nothing was found.${finds}`;
  if (!large) {
    const found = `${pixels.toLocaleString("en")} ${pixels === 1 ? "pixel" : "pixels"}`;
    return `No object was found. The mask has ${found}, but its parts are too small: an object has at least ${MIN_PIXELS}.${finds}`;
  }
  const share = Number(((100 * pixels) / (width * height)).toPrecision(2));
  const covered = `The mask covers ${share}% of the image, but its parts`;
  return `No object was found. ${covered} are too uncertain, or smaller than ${MIN_PIXELS} pixels.${finds}`;
}
