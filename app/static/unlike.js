// Whether an image is unlike those that a shipped model was trained on, as far as its objects show it.
// The limits lie between the validation images and other images; docs/decisions/0036 has the figures.

const ADVICE = "Check the result before you use it.";

/** By model: the least median score, the least score weighted by area, the largest uncertain part of the mask. */
const LIMITS = {
  nuclei: { median: 0.93, rest: 0.25, of: "cell nuclei under a microscope" },
  person: { mean: 0.895, of: "people in the street, from head to foot" },
};

const sum = (values) => values.reduce((total, value) => total + value, 0);

/** A sentence for the user, or "". Scores depend on the threshold, so only the model's own is judged. */
export function describeUnlike({ table, size, statistics, settings }) {
  const name = statistics.model?.split("@")[0] || settings.model;
  const limits = LIMITS[name];
  if (!table.count) return `Nothing was found.${limits ? ` The model is for images of ${limits.of}.` : ""}`;
  if (!limits || settings.threshold) return "";
  const scores = Array.from(table.scores).sort((a, b) => a - b);
  const areas = Array.from(table.areas);
  const total = sum(areas);
  const median = scores[Math.floor(scores.length / 2)];
  const mean = sum(areas.map((area, index) => area * table.scores[index])) / total;
  const covered = (statistics.coverage ?? 0) * size.width * size.height;
  const rest = covered > total ? 1 - total / covered : 0;
  const reasons = [];
  if (median < limits.median || mean < limits.mean) reasons.push("the model is less sure than usual");
  if (rest > limits.rest) reasons.push("much of the mask is too uncertain to count as objects");
  if (!reasons.length) return "";
  return `Unlike the images that the model was trained on (${limits.of}): ${reasons.join(", and ")}. ${ADVICE}`;
}
