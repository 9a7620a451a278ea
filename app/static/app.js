// The page: images in, masks over them. No dependencies, no build step.

const AT_ONCE = 3; // one decodes and one encodes while the engine has the third
const ATTEMPTS = 20; // at a busy service, each after the time it asked for
const TINT = [255, 64, 129];

const $ = (id) => document.getElementById(id);
const items = []; // {file, name, state, image, mask, tint, edges, blob, headers, seconds, error}
let shown = null;
let running = 0;
const view = { overlay: true, outline: false, mask: false };
const keys = { name: "unet-api-key" }; // kept until the tab is closed, when the service asks for one

// --- images in -------------------------------------------------------------------------------

function add(files) {
  const known = /\.(png|jpe?g|tiff?|webp|bmp|gif)$/i;
  const many = files.length > 1; // of a folder, only what looks like an image
  const chosen = [...files].filter((file) => !many || file.type.startsWith("image/") || known.test(file.name));
  for (const file of chosen) {
    const item = { file, name: file.name, state: "waiting" };
    items.push(item);
    addThumbnail(item);
  }
  if (!chosen.length) return say("There is no image among these files.");
  $("work").hidden = false;
  if (!shown || shown.state !== "waiting") show(items.at(-chosen.length));
  next();
}

function next() {
  while (running < AT_ONCE) {
    const item = items.find((each) => each.state === "waiting");
    if (!item) break;
    running += 1;
    setState(item, "working");
    segment(item)
      .catch((error) => {
        item.error = error.message || "The service did not answer.";
        setState(item, "failed");
      })
      .finally(() => {
        running -= 1;
        if (item === shown) draw();
        drawThumbnail(item);
        tell();
        next();
      });
  }
  tell();
}

async function segment(item) {
  item.image = await decode(item.file);
  drawThumbnail(item);
  if (item === shown) draw();
  const started = performance.now();
  const answer = await post(item, "mask");
  item.seconds = (performance.now() - started) / 1000;
  item.headers = answer.headers;
  item.blob = await answer.blob();
  item.mask = await createImageBitmap(item.blob);
  if (!item.image) {
    // the browser cannot show this format, the service can: as an overlay, which is taken off again
    const overlay = await createImageBitmap(await (await post(item, "overlay")).blob());
    item.image = untinted(overlay, item.mask);
    item.shownByService = true;
  }
  paint(item);
  setState(item, "done");
}

async function post(item, output) {
  item.model ??= $("model").value;
  const query = new URLSearchParams(item.model ? { output, model: item.model } : { output });
  for (let attempt = 1; ; attempt += 1) {
    const answer = await ask(`/segment?${query}`, {
      method: "POST",
      headers: { "Content-Type": "application/octet-stream" },
      body: item.file,
    });
    if (answer.ok) return answer;
    if ((answer.status === 429 || answer.status === 503) && attempt < ATTEMPTS) {
      const seconds = Number(answer.headers.get("Retry-After")) || 1;
      await new Promise((done) => setTimeout(done, seconds * 1000));
      continue;
    }
    const problem = await answer.json().catch(() => ({}));
    throw new Error(problem.detail || `The service answered ${answer.status}.`);
  }
}

/** fetch with the key the service wants, once somebody has typed it. */
async function ask(url, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(keys.name);
    const answer = await fetch(url, {
      ...options,
      headers: { ...options.headers, ...(key ? { "X-API-Key": key } : {}) },
    });
    if (answer.status !== 401) return answer;
    await askForKey(key);
  }
}

function askForKey(refused) {
  if (sessionStorage.getItem(keys.name) !== refused) return Promise.resolve(); // another was typed
  $("key-note").textContent = refused ? "That key was refused." : "This service asks for an API key.";
  $("key-form").hidden = false;
  keys.typed ??= new Promise((done) => {
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(keys.name, $("key").value.trim());
      $("key-form").hidden = true;
      keys.typed = null;
      done();
    };
  });
  return keys.typed;
}

async function decode(file) {
  try {
    return await createImageBitmap(file); // upright, as EXIF says
  } catch {
    return null;
  }
}

// --- masks on canvases -----------------------------------------------------------------------

function canvasOf(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

/** The image under an overlay of the service, which is (image + TINT) / 2 inside the mask. */
function untinted(overlay, mask) {
  const { width, height } = mask;
  const [below, above] = [overlay, mask].map((source) => {
    const context = canvasOf(width, height).getContext("2d", { willReadFrequently: true });
    context.drawImage(source, 0, 0);
    return context;
  });
  const pixels = below.getImageData(0, 0, width, height);
  const inside = above.getImageData(0, 0, width, height).data;
  for (let i = 0; i < inside.length; i += 4) {
    if (!inside[i] && !inside[i + 1] && !inside[i + 2]) continue;
    // what the halving cut off is lost: the result is as it was, or one less. Bytes are clamped.
    for (let c = 0; c < 3; c += 1) pixels.data[i + c] = 2 * pixels.data[i + c] - TINT[c];
  }
  below.putImageData(pixels, 0, 0);
  return below.canvas;
}

/** Two layers from a mask: its area and its outline, coloured, transparent elsewhere. */
function paint(item) {
  const { width, height } = item.mask;
  const area = canvasOf(width, height);
  const context = area.getContext("2d", { willReadFrequently: true });
  context.drawImage(item.mask, 0, 0);
  const pixels = context.getImageData(0, 0, width, height);
  const edges = context.createImageData(width, height);
  const { data } = pixels;
  const inside = new Uint8Array(width * height);
  for (let i = 0; i < inside.length; i += 1) {
    inside[i] = data[4 * i] || data[4 * i + 1] || data[4 * i + 2] ? 1 : 0;
  }
  for (let y = 0, i = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1, i += 1) {
      const j = 4 * i;
      if (!inside[i]) {
        data[j + 3] = 0;
        continue;
      }
      // black and white masks get our colour, class masks keep their palette's
      if (data[j] === 255 && data[j + 1] === 255 && data[j + 2] === 255) data.set(TINT, j);
      const inner =
        x > 0 && x < width - 1 && y > 0 && y < height - 1 &&
        inside[i - 1] && inside[i + 1] && inside[i - width] && inside[i + width];
      if (!inner) edges.data.set(data.subarray(j, j + 4), j);
    }
  }
  context.putImageData(pixels, 0, 0);
  item.tint = area;
  item.edges = canvasOf(width, height);
  item.edges.getContext("2d").putImageData(edges, 0, 0);
}

function draw() {
  const item = shown;
  const canvas = $("canvas");
  const context = canvas.getContext("2d");
  const source = item.mask || item.image;
  canvas.width = source ? source.width : 640;
  canvas.height = source ? source.height : 320;
  // small images are shown at twice their size, as far as there is room
  canvas.style.width = `${Math.max(canvas.width, Math.min(2 * canvas.width, 640))}px`;
  if (view.mask && item.mask) {
    context.drawImage(item.mask, 0, 0);
  } else {
    if (item.image) context.drawImage(item.image, 0, 0, canvas.width, canvas.height);
    if (view.overlay && item.tint) {
      context.globalAlpha = view.outline ? 1 : $("opacity").value / 100;
      context.drawImage(view.outline ? item.edges : item.tint, 0, 0);
    }
  }
  $("stage").hidden = !source && item.state === "failed";
  $("name").textContent = item.name;
  $("error").hidden = item.state !== "failed";
  $("error").textContent = item.error || "";
  $("note").hidden = !item.shownByService;
  $("note").textContent = "Your browser cannot show this format; the service drew it.";
  $("download").disabled = $("kind").disabled = item.state !== "done";
  facts(item);
}

function facts(item) {
  const rows = [];
  if (item.state === "done") {
    const { headers } = item;
    const percent = (name) => `${(100 * Number(headers.get(name))).toFixed(1)} %`;
    const stages = Object.fromEntries(
      [...(headers.get("Server-Timing") || "").matchAll(/(\w+);dur=([\d.]+)/g)].map((m) => [m[1], Number(m[2])]),
    );
    rows.push(["Size", `${item.mask.width} × ${item.mask.height}`]);
    rows.push(["Foreground", percent("X-Mask-Coverage")]);
    rows.push(["Confidence", percent("X-Mask-Confidence")]);
    rows.push(["Time", `${item.seconds.toFixed(2)} s`]);
    rows.push(["of it, network", `${(stages.infer / 1000).toFixed(2)} s`]);
    rows.push(["Model", headers.get("X-Model")]);
    rows.push(["Engine", headers.get("X-Engine")]);
  }
  $("facts").replaceChildren(
    ...rows.map(([term, value]) => {
      const row = document.createElement("div");
      const dt = document.createElement("dt");
      const dd = document.createElement("dd");
      dt.textContent = term;
      dd.textContent = value;
      row.append(dt, dd);
      return row;
    }),
  );
}

// --- the strip -------------------------------------------------------------------------------

function addThumbnail(item) {
  const entry = document.createElement("li");
  const button = document.createElement("button");
  const label = document.createElement("span");
  item.thumbnail = canvasOf(156, 156);
  item.button = button;
  button.type = "button";
  button.title = item.name;
  label.textContent = item.name;
  button.append(item.thumbnail, label);
  button.addEventListener("click", () => show(item));
  entry.append(button);
  $("strip").append(entry);
  setState(item, "waiting");
}

function drawThumbnail(item) {
  const source = item.image || item.mask;
  if (!source) return;
  const context = item.thumbnail.getContext("2d");
  const side = Math.min(source.width, source.height);
  const crop = [(source.width - side) / 2, (source.height - side) / 2, side, side, 0, 0, 156, 156];
  context.drawImage(source, ...crop);
  if (item.tint) {
    context.globalAlpha = 0.5;
    context.drawImage(item.tint, ...crop);
    context.globalAlpha = 1;
  }
}

function setState(item, state) {
  item.state = state;
  item.button.dataset.state = state;
  item.button.setAttribute("aria-label", `${item.name}, ${state}`);
}

function show(item) {
  shown = item;
  for (const each of items) each.button.setAttribute("aria-pressed", String(each === item));
  draw();
}

function say(text) {
  $("status").textContent = text;
}

function tell() {
  const count = (state) => items.filter((item) => item.state === state).length;
  const [done, failed] = [count("done"), count("failed")];
  const left = items.length - done - failed;
  const parts = [];
  if (left) parts.push(`${left} to do`);
  if (done) parts.push(`${done} ${done === 1 ? "mask" : "masks"} made`);
  if (failed) parts.push(`${failed} failed`);
  say(parts.join(", "));
  $("download-all").hidden = done < 2;
}

// --- masks out -------------------------------------------------------------------------------

const maskName = (item) => `${item.name.replace(/\.[^.]+$/, "")}-mask.png`;

/** What was chosen beside the button; everything but the mask is made now. */
async function download(item, kind) {
  if (kind === "mask") return save(item.blob, maskName(item));
  const answer = await post(item, kind);
  const name = maskName(item).replace(/-mask\.png$/, "");
  if (kind !== "polygons") return save(await answer.blob(), `${name}-${kind}.png`);
  const [{ polygons }] = (await answer.json()).images;
  return save(new Blob([JSON.stringify(polygons)], { type: "application/geo+json" }), `${name}.geojson`);
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function crc32(bytes) {
  let crc = -1;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit += 1) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return (crc ^ -1) >>> 0;
}

/** A zip archive that stores its files as they are: PNG is compressed already. */
async function zip(files) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const [name, blob] of files) {
    const path = new TextEncoder().encode(name);
    const bytes = new Uint8Array(await blob.arrayBuffer());
    const fields = new DataView(new ArrayBuffer(26)); // what both kinds of header share
    fields.setUint16(0, 20, true); // version needed
    fields.setUint16(2, 0x0800, true); // names are UTF-8
    fields.setUint16(8, 0x21, true); // 1980-01-01: masks have no time of their own
    fields.setUint32(10, crc32(bytes), true);
    fields.setUint32(14, bytes.length, true);
    fields.setUint32(18, bytes.length, true);
    fields.setUint16(22, path.length, true);
    const entry = new DataView(new ArrayBuffer(14));
    entry.setUint32(10, offset, true);
    directory.push(new Uint8Array([0x50, 0x4b, 1, 2, 20, 0]), fields.buffer, entry.buffer, path);
    parts.push(new Uint8Array([0x50, 0x4b, 3, 4]), fields.buffer, path, bytes);
    offset += 30 + path.length + bytes.length;
  }
  const size = directory.reduce((sum, part) => sum + part.byteLength, 0);
  const end = new DataView(new ArrayBuffer(22));
  end.setUint32(0, 0x06054b50, true);
  end.setUint16(8, files.length, true);
  end.setUint16(10, files.length, true);
  end.setUint32(12, size, true);
  end.setUint32(16, offset, true);
  return new Blob([...parts, ...directory, end.buffer], { type: "application/zip" });
}

function uniqueMasks() {
  const taken = new Set();
  return items
    .filter((item) => item.state === "done")
    .map((item) => {
      let name = maskName(item);
      for (let n = 2; taken.has(name); n += 1) name = maskName(item).replace(/-mask\.png$/, `-${n}-mask.png`);
      taken.add(name);
      return [name, item.blob];
    });
}

// --- hands -----------------------------------------------------------------------------------

async function filesOf(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  const files = [];
  const walk = async (entry) => {
    if (entry.isFile) {
      files.push(await new Promise((done, failed) => entry.file(done, failed)));
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      const batch = await new Promise((done, failed) => reader.readEntries(done, failed));
      if (!batch.length) break; // it gives at most a hundred at a time
      for (const each of batch) await walk(each);
    }
  };
  for (const entry of entries) await walk(entry);
  return files;
}

function toggle(name) {
  view[name] = !view[name];
  if (name === "outline" && view.outline) view.overlay = true;
  for (const each of Object.keys(view)) $(each).setAttribute("aria-pressed", String(view[each]));
  if (shown) draw();
}

for (const input of [$("files"), $("folder")]) {
  input.addEventListener("change", () => {
    add(input.files);
    input.value = ""; // so that the same file can be chosen again
  });
}
for (const button of document.querySelectorAll("[data-sample]")) {
  button.addEventListener("click", async () => {
    const answer = await fetch(button.dataset.sample);
    add([new File([await answer.blob()], button.dataset.sample.split("/").at(-1))]);
  });
}
addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").classList.remove("over");
});
addEventListener("drop", async (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  add(await filesOf(event.dataTransfer));
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) add(event.clipboardData.files);
});
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !shown) return;
  if (["INPUT", "SELECT"].includes(event.target.tagName)) return;
  const name = { o: "overlay", l: "outline", m: "mask" }[event.key.toLowerCase()];
  if (name && !$(name).disabled) toggle(name);
});
for (const name of Object.keys(view)) $(name).addEventListener("click", () => toggle(name));
$("opacity").addEventListener("input", () => shown && draw());
$("download").addEventListener("click", () => {
  download(shown, $("kind").value).catch((error) => say(error.message));
});
$("download-all").addEventListener("click", async () => save(await zip(uniqueMasks()), "masks.zip"));
$("curl").textContent = `curl -F file=@image.png ${location.origin}/segment -o mask.png`;

async function introduce() {
  try {
    const { default: name, models } = await (await ask("/models")).json();
    const ready = models.filter((each) => each.ready);
    $("model").replaceChildren(
      ...ready.map((each) => {
        const finds = each.classes.slice(1).join(", ");
        return new Option(`${each.name} (finds: ${finds})`, each.name, each.default, each.default);
      }),
    );
    $("models").hidden = ready.length < 2;
    const model = models.find((each) => each.name === name);
    $("service").textContent = model.ready
      ? `finds: ${model.classes.slice(1).join(", ")} · model ${model.id} on ${model.device}`
      : `model ${name} is loading …`;
    if (models.some((each) => !each.ready && !each.error)) setTimeout(introduce, 1000);
  } catch {
    $("service").textContent = "the service does not tell its models";
  }
}
introduce();
