// HTTP client of the service: adds the API key and retries. Does not know the page.
// URLs are relative, so that the page works behind a path prefix such as https://lab/unet/.

import { askForKey, storedKey } from "./key.js";

const UNREACHABLE = "unreachable"; // no response, or a 502 of a proxy
const MAX_ATTEMPTS = { 429: 20, 503: 20, 504: 4, [UNREACHABLE]: 8 }; // the service starts within 90 s
const MAX_DELAY_S = 30; // between two attempts, where the service sends no Retry-After
const LARGE_UPLOAD = 1e8; // bytes; a server or proxy may close the connection instead of responding

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
 * Segment one image: {blob, statistics}. Retries while the queue is full, the deadline is missed, or the
 * service is starting or unreachable.
 *
 * @param item {file, model, threshold}; an empty model or threshold means the service's default
 * @param signal of an AbortController, to cancel
 * @param onWait called with the reason before each delay, and with "" after it
 */
export async function segment({ file, model, threshold }, output, { signal, onWait } = {}) {
  const query = new URLSearchParams({ output });
  if (model) query.set("model", model);
  if (threshold) query.set("threshold", threshold);
  const attempts = {}; // by cause, because a service that has just restarted may be busy
  for (;;) {
    const megabytes = Math.round(file.size / 1e6);
    const large = file.size > LARGE_UPLOAD ? `, or rejects uploads of ${megabytes} MB` : "";
    let response = null;
    let cause = UNREACHABLE;
    let problem = `The server cannot be reached${large}.`;
    try {
      response = await fetchWithKey(`segment?${query}`, {
        method: "POST",
        headers: { "Content-Type": "application/octet-stream" },
        body: file,
        signal,
      });
      if (response.ok) return { blob: await response.blob(), statistics: parseStatistics(response.headers) };
    } catch (error) {
      if (signal?.aborted) throw error;
      await checkReadable(file); // fetch reports a missing file and a network failure alike
    }
    if (response && !response.ok && response.status !== 502) {
      cause = response.status;
      problem = (await response.json().catch(() => ({}))).detail || `The server responded with status ${cause}.`;
    }
    attempts[cause] = (attempts[cause] || 0) + 1;
    if (attempts[cause] >= (MAX_ATTEMPTS[cause] || 1)) throw new Error(problem);
    const backoff = Math.min(2 ** (attempts[cause] - 1), MAX_DELAY_S);
    if (cause !== 429) onWait?.(problem); // a full queue is normal while many images are sent
    await sleep(Number(response?.headers.get("Retry-After")) || backoff, signal);
    onWait?.("");
  }
}

async function checkReadable(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw new Error("The file has been changed or moved. Add it again.");
  }
}

function sleep(seconds, signal) {
  return new Promise((resolve, reject) => {
    setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}

/** The statistics in the response headers; null for a header that is missing, as with some proxies. */
function parseStatistics(headers) {
  const number = (text) => (text && Number.isFinite(Number(text)) ? Number(text) : null);
  const infer = /\binfer;dur=([\d.]+)/.exec(headers.get("Server-Timing") || "");
  return {
    foreground: number(headers.get("X-Mask-Coverage")),
    confidence: number(headers.get("X-Mask-Confidence")),
    objects: number(headers.get("X-Mask-Objects")),
    modelSeconds: infer && Number(infer[1]) / 1000,
    model: headers.get("X-Model"),
    engine: headers.get("X-Engine"),
  };
}
