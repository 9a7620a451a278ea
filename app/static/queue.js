// Decides when requests are sent. While the service is busy, restarts or is away, the queue waits as a whole
// and a single request tries again. Large images are sent one at a time: they would compete for one deadline.

import { Failure, isAlive, segment } from "./service.js";

const FIRST_DELAY_S = 1;
const MAX_DELAY_S = 15;
const MAX_LATE = 4; // attempts of an image that misses its deadline
const MAX_BROKEN = 3; // attempts of an image whose connection breaks while the service responds to others

export const REASONS = {
  busy: "The server is busy with other work.",
  restarting: "The server is restarting.",
  late: "The server has much to do.",
  away: "The server cannot be reached.",
};

let pause = null; // {reason, until, delay, trying}
let largeImage = Promise.resolve(); // settles when no large image is in flight
let notify = () => {};

/** Why the queue waits: a key of `REASONS`, or "". */
export const pauseKind = () => pause?.reason || "";

/** Why the queue waits, for people, or "". */
export const pauseReason = () => (pause ? `${REASONS[pause.reason]} This continues by itself.` : "");

/** Call `listener` when the queue begins or ends to wait. */
export function onPause(listener) {
  notify = listener;
}

/** Run `work` while no other large image is in flight. */
export async function runAlone(signal, work) {
  const previous = largeImage;
  let finish;
  largeImage = new Promise((resolve) => {
    finish = resolve;
  });
  try {
    await previous;
    signal?.throwIfAborted();
    return await work();
  } finally {
    finish();
  }
}

/**
 * `segment` of service.js that waits as long as the service is expected to return.
 *
 * @throws Failure if a retry is useless
 */
export async function segmentPatiently(item, outputs, signal) {
  let late = 0;
  let broken = 0;
  for (;;) {
    const attempt = await waitForTurn(signal);
    try {
      const result = await segment(item, outputs, signal);
      endPause();
      return result;
    } catch (error) {
      if (signal?.aborted) throw error;
      if (!(error instanceof Failure) || !error.temporary) {
        endPause();
        throw error;
      }
      // with Retry-After, others are in the way; without, this image takes longer than its deadline
      if (error.temporary === "late" && !error.retryAfter) late += 1;
      if (error.temporary === "away" && (await isAlive())) broken += 1;
      if (late >= MAX_LATE) {
        endPause();
        throw error;
      }
      if (broken >= MAX_BROKEN) {
        endPause();
        throw new Failure(`The connection broke ${broken} times while this image was sent. ${error.message}`);
      }
      beginPause(error);
    } finally {
      if (attempt) attempt.trying = false;
    }
  }
}

/** Wait until requests may be sent. Returns the pause if this request is the one that tries. */
async function waitForTurn(signal) {
  while (pause) {
    if (!pause.trying && Date.now() >= pause.until) {
      pause.trying = true;
      return pause;
    }
    await sleep(Math.min(1, Math.max(0.05, (pause.until - Date.now()) / 1000)), signal);
  }
  return null;
}

function beginPause({ temporary, retryAfter }) {
  const delay = pause ? Math.min(pause.delay * 2, MAX_DELAY_S) : FIRST_DELAY_S;
  pause ??= {};
  const until = Date.now() + 1000 * (Math.min(retryAfter, 60) || delay);
  Object.assign(pause, { reason: temporary, delay, until });
  notify();
}

function endPause() {
  if (!pause) return;
  pause = null;
  notify();
}

/** Forget the pause, because nothing is left to send. */
export const resetPause = endPause;

function sleep(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    const abort = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    signal?.addEventListener("abort", abort, { once: true });
  });
}
