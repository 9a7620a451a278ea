// The worker of background.js.

import { TASKS } from "./tasks.js";

addEventListener("message", async ({ data: { number, name, args } }) => {
  try {
    const result = await TASKS[name](...args);
    postMessage({ number, result }, [...new Set(listTransferables(result))]);
  } catch (error) {
    postMessage({ number, error: error.message || "This browser cannot do that." });
  }
});

/** List buffers and bitmaps, which are moved to the page instead of being copied. */
function listTransferables(value) {
  if (value instanceof ImageBitmap) return [value];
  if (ArrayBuffer.isView(value)) return [value.buffer];
  if (value instanceof Map) return [...value.values()].flatMap(listTransferables);
  if (Array.isArray(value)) return typeof value[0] === "object" ? value.flatMap(listTransferables) : [];
  if (value && Object.getPrototypeOf(value) === Object.prototype) return Object.values(value).flatMap(listTransferables);
  return [];
}
