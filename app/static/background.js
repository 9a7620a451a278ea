// Runs the tasks of tasks.js in a worker, so that the page stays responsive while an image of 20 megapixels is
// decoded. Browsers without module workers or canvases in workers run them on the page instead.

import { TASKS } from "./tasks.js";

const pending = new Map(); // by number: {name, args, resolve, reject}
let worker = start();
let count = 0;

function start() {
  if (typeof Worker === "undefined" || typeof OffscreenCanvas === "undefined") return null;
  try {
    const started = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
    started.addEventListener("message", ({ data: { number, result, error } }) => {
      const task = pending.get(number);
      pending.delete(number);
      if (error) task?.reject(new Error(error));
      else task?.resolve(result);
    });
    started.addEventListener("error", runHere); // it could not be loaded
    return started;
  } catch {
    return null;
  }
}

/** Run what the worker has not done on the page, and everything after it. */
function runHere() {
  worker.terminate();
  worker = null;
  for (const { name, args, resolve } of pending.values()) resolve(TASKS[name](...args));
  pending.clear();
}

/** Run a task. Its arguments are copied, but not the bytes of files and blobs. */
export async function run(name, ...args) {
  if (!worker) return TASKS[name](...args);
  return new Promise((resolve, reject) => {
    count += 1;
    pending.set(count, { name, args, resolve, reject });
    worker.postMessage({ number: count, name, args });
  });
}
