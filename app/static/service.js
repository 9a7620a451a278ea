// Talking to the service, as any client does: with a key, and with patience. Knows no page.
// Addresses are relative, so that the page works behind a prefix such as https://lab/unet/.

import { askForKey, key } from "./key.js";

const AWAY = "away"; // no answer at all, or a proxy's word that there is nobody behind it
const PATIENCE = { 429: 20, 503: 20, 504: 4, [AWAY]: 8 }; // attempts; a service starts within 90 s
const LONGEST = 30; // seconds between two attempts, where the service does not say
const LARGE = 1e8; // bytes; a service or a proxy may hang up on so many instead of answering

/** fetch with the key the service wants, once somebody has typed it. */
export async function ask(url, options = {}) {
  for (;;) {
    const sent = key();
    const answer = await fetch(url, {
      ...options,
      headers: { ...options.headers, ...(sent ? { "X-API-Key": sent } : {}) },
    });
    if (answer.status !== 401) return answer;
    await askForKey(sent);
  }
}

/**
 * One image, one output: {blob, figures}. What may pass is waited for: a full queue, a late answer,
 * a service that starts, and one that cannot be reached.
 *
 * @param wanted {file, model, threshold}; an empty model or threshold is the service's own
 * @param signal of an AbortController, when nobody wants the answer any more
 * @param waiting told why, before each wait, and "" after it
 */
export async function segment({ file, model, threshold }, output, { signal, waiting } = {}) {
  const query = new URLSearchParams({ output });
  if (model) query.set("model", model);
  if (threshold) query.set("threshold", threshold);
  const attempts = {}; // by cause: a service that has come back may be busy at first
  for (;;) {
    const large = file.size > LARGE ? `, or does not take ${Math.round(file.size / 1e6)} MB` : "";
    let [answer, cause, problem] = [null, AWAY, `The service cannot be reached${large}.`];
    try {
      answer = await ask(`segment?${query}`, {
        method: "POST",
        headers: { "Content-Type": "application/octet-stream" },
        body: file,
        signal,
      });
      if (answer.ok) return { blob: await answer.blob(), figures: figuresOf(answer.headers) };
    } catch (error) {
      if (signal?.aborted) throw error;
      await readable(file); // fetch says the same of a network and of a file that is gone
    }
    if (answer && !answer.ok && answer.status !== 502) {
      cause = answer.status;
      problem = (await answer.json().catch(() => ({}))).detail || `The service answered ${cause}.`;
    }
    attempts[cause] = (attempts[cause] || 0) + 1;
    if (attempts[cause] >= (PATIENCE[cause] || 1)) throw new Error(problem);
    const growing = Math.min(2 ** (attempts[cause] - 1), LONGEST);
    if (cause !== 429) waiting?.(problem); // that the queue is full is no news
    await pause(Number(answer?.headers.get("Retry-After")) || growing, signal);
    waiting?.("");
  }
}

async function readable(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw new Error("The file was changed or moved since it was chosen; add it again.");
  }
}

function pause(seconds, signal) {
  return new Promise((done, failed) => {
    setTimeout(done, seconds * 1000);
    signal?.addEventListener("abort", () => failed(signal.reason), { once: true });
  });
}

/** What the headers of an answer tell of its mask; null where one is missing, as behind some proxies. */
function figuresOf(headers) {
  const number = (text) => (text && Number.isFinite(Number(text)) ? Number(text) : null);
  const infer = /\binfer;dur=([\d.]+)/.exec(headers.get("Server-Timing") || "");
  return {
    foreground: number(headers.get("X-Mask-Coverage")),
    confidence: number(headers.get("X-Mask-Confidence")),
    objects: number(headers.get("X-Mask-Objects")),
    network: infer && Number(infer[1]) / 1000,
    model: headers.get("X-Model"),
    engine: headers.get("X-Engine"),
  };
}
