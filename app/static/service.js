// HTTP client of the service: adds the API key, and sorts responses into results and failures. Does not know
// the page and never waits; items.js does. URLs are relative, so that the page works behind a path prefix
// such as https://lab/unet/.

import { askForKey, storedKey } from "./key.js";
import { unzip } from "./zip.js";

const LONGEST_TIMEOUT_S = 3600; // more than a service allows; it takes its own limit then
const PROBE_MS = 8000; // a server that takes longer for a probe does not respond
const LARGE_UPLOAD = 1e8; // bytes; a server or proxy may close the connection instead of responding

/** A request that gave no result. `temporary` is busy, restarting, late or away; empty if a retry is useless. */
export class Failure extends Error {
  constructor(message, { temporary = "", retryAfter = 0, status = 0 } = {}) {
    super(message);
    Object.assign(this, { temporary, retryAfter, status });
  }
}

const TEMPORARY = { 429: "busy", 502: "away", 503: "restarting", 504: "late" };

/** fetch with the API key. Asks the user for one while the service responds with 401. */
export async function fetchWithKey(url, options = {}) {
  for (;;) {
    const key = storedKey();
    const response = await fetch(url, {
      ...options,
      headers: { ...options.headers, ...(key ? { "X-API-Key": key } : {}) },
    });
    if (response.status !== 401) return response;
    await askForKey(key);
  }
}

/**
 * Send one image: {outputs, statistics}. `outputs` has a blob by name.
 *
 * @param item {file, settings}; settings that are null, undefined or "" are the service's to choose
 * @param names of the outputs; the network runs once for all of them
 * @throws Failure
 */
export async function segment({ file, settings }, names, signal) {
  const query = new URLSearchParams(names.map((name) => ["output", name]));
  for (const [name, value] of Object.entries(settings)) {
    if (value !== null && value !== undefined && value !== "") query.set(name, value);
  }
  let response;
  try {
    response = await fetchWithKey(`segment?${query}`, {
      method: "POST",
      headers: { "Content-Type": "application/octet-stream", "X-Request-Timeout": String(LONGEST_TIMEOUT_S) },
      body: file,
      signal,
    });
    if (response.ok) return { outputs: await readOutputs(response, names), statistics: readStatistics(response.headers) };
  } catch (error) {
    if (signal?.aborted || error instanceof Failure) throw error;
    if (response?.ok && !(error instanceof TypeError)) throw new Failure(error.message);
    await checkReadable(file); // fetch reports a missing file and a network failure alike
    const large = file.size > LARGE_UPLOAD ? `, or rejects uploads of ${Math.round(file.size / 1e6)} MB` : "";
    throw new Failure(`The server cannot be reached${large}.`, { temporary: "away" });
  }
  const problem = await response.json().catch(() => ({}));
  throw new Failure(rephrase(problem.detail || `The server responded with status ${response.status}.`), {
    temporary: TEMPORARY[response.status],
    retryAfter: Number(response.headers.get("Retry-After")) || 0,
    status: response.status,
  });
}

/** Whether the service responds at all. */
export async function isAlive() {
  try {
    return (await fetch("livez")).status < 500;
  } catch {
    return false;
  }
}

/** Why the service cannot be used now: "away", "restarting" and so on, as of a Failure; "" if it can. */
export async function findTrouble() {
  try {
    const { status } = await fetch("readyz", { cache: "no-store", signal: AbortSignal.timeout?.(PROBE_MS) });
    return TEMPORARY[status] || "";
  } catch {
    return "away";
  }
}

/** A detail of the service in the page's words. */
function rephrase(detail) {
  const late = /estimated ([\d.]+) s exceeds the ([\d.]+) s remaining/.exec(detail);
  if (late) return `Too large for this server now (about ${Math.round(late[1])} s, limit ${Math.round(late[2])} s).`;
  return detail.replace(/; send (.*?)\.?$/, ". Use $1.").replace(/^[a-z](?=[a-z]* )/, (letter) => letter.toUpperCase());
}

async function checkReadable(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw new Failure("The file has been changed or moved. Add it again.");
  }
}

const SUFFIXES = { ".geojson": "polygons", ".csv": "measurements", ".zip": "rois", ".json": "coco" };

/** The outputs of a response: one is the body, several are in a zip as NAME-OUTPUT.png or NAME.geojson. */
async function readOutputs(response, names) {
  const body = await response.blob();
  if (/html/.test(body.type)) throw new Failure("Unexpected response (a proxy?)");
  if (names.length === 1) return { [names[0]]: body };
  const outputs = {};
  for (const [path, blob] of await unzip(body)) {
    const [, name, suffix] = /(?:-([a-z]+))?(\.[a-z]+)$/.exec(path);
    const pictures = names.filter((each) => !Object.values(SUFFIXES).includes(each));
    outputs[SUFFIXES[suffix] || (pictures.length === 1 ? pictures[0] : name)] = blob;
  }
  const missing = names.filter((name) => !outputs[name]);
  if (missing.length) throw new Failure(`The response lacks ${missing.join(" and ")}.`);
  return outputs;
}

/** The statistics in the response headers; null for a header that is missing, as with some proxies. */
function readStatistics(headers) {
  const number = (text) => (text && Number.isFinite(Number(text)) ? Number(text) : null);
  const infer = /\binfer;dur=([\d.]+)/.exec(headers.get("Server-Timing") || "");
  return {
    coverage: number(headers.get("X-Mask-Coverage")),
    confidence: number(headers.get("X-Mask-Confidence")),
    pages: number(headers.get("X-Image-Pages")),
    modelSeconds: infer && Number(infer[1]) / 1000,
    model: headers.get("X-Model"),
    engine: headers.get("X-Engine"),
  };
}
