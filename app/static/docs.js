// The documentation: draws /openapi.json. No dependencies, no build step, no text taken for HTML.

const KEY = "unet-api-key"; // the page's own, so that it need not be typed twice
const LONGEST = 20000; // characters of an answer that are shown

const $ = (id) => document.getElementById(id);
let api = null;

/** An element with properties, attributes where the name has a dash, and children. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Paragraphs, with `code` as code. */
function prose(text) {
  return text.split(/\n\s*\n/).map((paragraph) => make("p", {}, ...spans(paragraph)));
}

const spans = (text) =>
  text.split("`").map((part, index) => (index % 2 ? make("code", { textContent: part }) : part));

// --- schemas ---------------------------------------------------------------------------------

const resolved = (schema = {}) =>
  schema.$ref ? { ...api.components.schemas[nameOf(schema)], ...schema } : schema;
const nameOf = (schema) => schema.$ref.split("/").at(-1);
const alternatives = (schema) =>
  (schema.anyOf || schema.oneOf || []).filter((each) => each.type !== "null");

/** What a value may be, in words; documents are links to where they are described. */
function kind(schema = {}) {
  const full = resolved(schema);
  if (full.const !== undefined) return [make("code", { textContent: full.const })];
  if (full.enum) return joined(full.enum.map((value) => [make("code", { textContent: value })]), ", ");
  if (schema.$ref) return [make("a", { href: `#${nameOf(schema)}`, textContent: nameOf(schema) })];
  if (alternatives(full).length) return joined(alternatives(full).map(kind), " or ");
  if (full.type === "array") return ["list of ", ...kind(full.items)];
  if (full.format === "binary" || full.contentMediaType) return ["bytes"];
  if (full.properties) {
    return joined(Object.entries(full.properties).map(([name, each]) => [make("code", { textContent: name }), ": ", ...kind(each)]), ", ");
  }
  const { minimum, maximum } = full;
  const range = [minimum !== undefined && `from ${minimum}`, maximum !== undefined && `to ${maximum}`];
  return [[full.type || "anything", ...range.filter(Boolean)].join(" ")];
}

const joined = (lists, separator) => lists.flatMap((list, index) => (index ? [separator, ...list] : list));

/** A value that fits, to start from. */
function sample(schema = {}, depth = 0) {
  const full = resolved(schema);
  if (full.example !== undefined) return full.example;
  if (full.examples?.length) return full.examples[0];
  if (full.default !== undefined) return full.default;
  if (full.const !== undefined) return full.const;
  if (full.enum) return full.enum[0];
  if (depth > 8) return null; // documents may contain themselves
  const [first] = alternatives(full);
  if (first) return sample(first, depth + 1);
  if (full.type === "array") return [sample(full.items, depth + 1)];
  if (full.type === "object" || full.properties) {
    const needed = new Set(full.required || []);
    const shown = Object.entries(full.properties || {}).filter(([name]) => needed.has(name));
    return Object.fromEntries(shown.map(([name, each]) => [name, sample(each, depth + 1)]));
  }
  return { string: "", integer: 0, number: 0, boolean: false }[full.type] ?? null;
}

function properties(name, schema) {
  const needed = new Set(schema.required || []);
  const article = make("article", { id: name }, make("h3", {}, name), ...prose(schema.description || ""));
  const rows = Object.entries(schema.properties || {}).map(([each, about]) => [
    [make("code", { textContent: each }), ...(needed.has(each) ? [] : [make("small", { textContent: "may be left out" })])],
    kind(about),
    spans(resolved(about).description || ""),
  ]);
  if (rows.length) article.append(table(`Fields of ${name}`, ["name", "value", "meaning"], rows));
  return article;
}

function table(label, heads, rows) {
  const cell = (tag, attributes) => (content) => make(tag, attributes, ...content);
  return make(
    "table",
    { "aria-label": label },
    make("thead", {}, make("tr", {}, ...heads.map((text) => cell("th", { scope: "col" })([text])))),
    make("tbody", {}, ...rows.map(([first, ...others]) =>
      make("tr", {}, cell("th", { scope: "row" })(first), ...others.map(cell("td", {}))))),
  );
}

// --- operations ------------------------------------------------------------------------------

function operation(path, method, about) {
  const id = `${method}-${path}`;
  const call = { path, method: method.toUpperCase(), fields: [], bodies: about.requestBody?.content || {} };
  const parameters = about.parameters || [];
  const article = make(
    "article",
    { id },
    make(
      "h3",
      {},
      make("a", { href: `#${id}` }, make("code", {}, make("span", { className: "method", textContent: call.method }), ` ${path}`)),
      make("span", { textContent: about.summary || "" }),
    ),
    ...prose(about.description || ""),
  );
  if (parameters.length) {
    const rows = parameters.map((each) => {
      const given = resolved(each.schema).default;
      const notes = [each.in, each.required && "required", given !== undefined && given !== null && `default ${given}`];
      return [
        [make("code", { textContent: each.name }), make("small", { textContent: notes.filter(Boolean).join(", ") })],
        kind(each.schema),
        spans(each.description || ""),
      ];
    });
    article.append(make("h4", { textContent: "Parameters" }), table("Parameters", ["name", "value", "meaning"], rows));
  }
  const bodies = Object.entries(call.bodies);
  if (bodies.length) {
    const rows = bodies.map(([type, { schema }]) => [[make("code", { textContent: type })], kind(schema)]);
    article.append(make("h4", { textContent: bodies.length > 1 ? "Body, one of" : "Body" }), table("Body", ["type", "content"], rows));
  }
  const answers = Object.entries(about.responses || {}).map(([status, { description, content }]) => [
    [status],
    spans(description || ""),
    joined(Object.entries(content || {}).map(([type, { schema }]) => [
      make("code", { textContent: type }), ...(schema?.$ref ? [" ", ...kind(schema)] : []),
    ]), ", "),
  ]);
  article.append(make("h4", { textContent: "Answers" }), table("Answers", ["status", "when", "content"], answers));
  call.answers = Object.keys(about.responses?.["200"]?.content || {});
  article.append(...attempt(call, parameters, id));
  return article;
}

/** The command line of a request, and a form that makes it and sends it. */
function attempt(call, parameters, id) {
  const line = make("code");
  const copy = make("button", { type: "button", textContent: "Copy", "aria-label": `Copy the command line of ${call.method} ${call.path}` });
  const form = make("form", { className: "try" });
  const answer = make("div", { className: "answer", "aria-live": "polite" });
  const field = (name, control) => {
    control.id = `${id}?${name}`;
    form.append(make("label", { htmlFor: control.id, textContent: name }), control);
    return control;
  };
  for (const { name, in: where, required, schema } of parameters) {
    const control = field(name, choice(schema, required));
    call.fields.push({ name, where, control });
  }
  if (call.answers.length > 1) {
    const control = field("Accept", select(["", ...call.answers]));
    call.fields.push({ name: "Accept", where: "header", control });
  }
  const types = Object.keys(call.bodies);
  if (types.length) {
    call.type = field("Content-Type", select(types));
    call.file = field("files", make("input", { type: "file", multiple: true }));
    call.text = field("body", make("textarea", { spellcheck: false }));
  }
  const send = make("button", { type: "submit", className: "primary", textContent: "Send" });
  form.append(send);

  const refresh = () => {
    if (call.type) {
      const { schema, example } = call.bodies[call.type.value];
      const isFile = wantsFile(call.type.value);
      for (const [control, there] of [[call.file, isFile], [call.text, !isFile]]) {
        control.hidden = control.previousSibling.hidden = !there;
      }
      if (!isFile && !call.text.value) call.text.value = JSON.stringify(example ?? sample(schema), null, 2);
    }
    line.textContent = curl(call);
  };
  form.addEventListener("input", refresh);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    send.disabled = true;
    answer.replaceChildren(make("p", { textContent: "asking …" }));
    try {
      answer.replaceChildren(...(await ask(call)));
    } catch (error) {
      answer.replaceChildren(make("p", { className: "error", textContent: String(error.message || error) }));
    }
    send.disabled = false;
  });
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(line.textContent);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 2000);
  });
  refresh();
  const pieces = [line, ...(navigator.clipboard ? [copy] : [])]; // none where the page came over plain HTTP
  return [
    make("h4", { textContent: "From a shell" }),
    make("div", { className: "example" }, make("pre", {}, pieces[0]), ...pieces.slice(1)),
    make("details", {}, make("summary", { textContent: "Try it here" }), form, answer),
  ];
}

const wantsFile = (type) => !/^(application|text)\/(.*\+)?(json|plain)$/.test(type);

function choice(schema, required) {
  const options = resolved(schema).enum || (resolved(schema).type === "boolean" ? ["true", "false"] : null);
  if (options) return select(required ? options : ["", ...options]);
  return make("input", { type: "text", required: Boolean(required), autocomplete: "off", spellcheck: false });
}

const select = (values) => make("select", {}, ...values.map((value) => new Option(value || "not given", value)));

/** Where a request goes, with which headers. */
function target({ path, fields }) {
  const query = new URLSearchParams();
  const headers = {};
  for (const { name, where, control } of fields) {
    const value = control.value.trim();
    if (where === "path") path = path.replace(`{${name}}`, encodeURIComponent(value) || name.toUpperCase());
    else if (value && where === "query") query.append(name, value);
    else if (value && where === "header") headers[name] = value;
  }
  // beside this page, which may be behind a prefix
  return [new URL(`.${path}${query.size ? `?${query}` : ""}`, document.baseURI).href, headers];
}

const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);

function curl(call) {
  const [url, headers] = target(call);
  const words = ["curl"];
  const type = call.type?.value;
  const files = [...(call.file?.files || [])].map((file) => file.name);
  if (!files.length) files.push("image.png");
  if (!type && call.method !== "GET") words.push("-X", call.method);
  if (sessionStorage.getItem(KEY)) words.push("-H", quoted("X-API-Key: KEY")); // not the key itself
  for (const [name, value] of Object.entries(headers)) words.push("-H", quoted(`${name}: ${value}`));
  if (type === "multipart/form-data") {
    for (const file of files) words.push("-F", quoted(`file=@${file}`));
  } else if (type) {
    words.push("-H", quoted(`Content-Type: ${type.replace("*", "png")}`));
    words.push("--data-binary", quoted(wantsFile(type) ? `@${files[0]}` : call.text.value));
  }
  words.push(quoted(url));
  const [usual] = headers.Accept ? [headers.Accept] : call.answers;
  if (usual && !/json|text/.test(usual)) words.push("-o", `answer.${usual.split("/").at(-1)}`);
  return words.join(" ");
}

async function ask(call) {
  const [url, headers] = target(call);
  const key = sessionStorage.getItem(KEY);
  if (key) headers["X-API-Key"] = key;
  let body;
  const type = call.type?.value;
  const files = [...(call.file?.files || [])];
  if (type && wantsFile(type) && !files.length) throw new Error("Choose a file first.");
  if (type === "multipart/form-data") {
    body = new FormData();
    for (const file of files) body.append("file", file);
  } else if (type) {
    headers["Content-Type"] = type.includes("*") ? files[0].type || "image/png" : type;
    body = wantsFile(type) ? files[0] : call.text.value;
  }
  const started = performance.now();
  const response = await fetch(url, { method: call.method, headers, body });
  const blob = await response.blob();
  const seconds = ((performance.now() - started) / 1000).toFixed(2);
  const rows = [...response.headers].map(([name, value]) => [[name], [value]]);
  return [
    make("p", { className: response.ok ? "" : "error", textContent: `${response.status} ${response.statusText}, ${seconds} s` }),
    await shown(blob),
    make("details", {}, make("summary", { textContent: "Headers" }), table("Headers", ["name", "value"], rows)),
  ];
}

async function shown(blob) {
  if (blob.type.startsWith("image/")) {
    return make("img", { src: URL.createObjectURL(blob), alt: "The image of the answer" });
  }
  if (!/json|text/.test(blob.type)) {
    const name = `answer.${blob.type.split("/").at(-1)}`;
    return make("a", { href: URL.createObjectURL(blob), download: name, textContent: `${name}, ${blob.size} bytes` });
  }
  let text = await blob.text();
  if (blob.type.includes("json")) text = JSON.stringify(JSON.parse(text), null, 2);
  return make("pre", {}, text.length > LONGEST ? `${text.slice(0, LONGEST)}\n… of ${text.length} characters` : text);
}

// --- the document ----------------------------------------------------------------------------

function draw() {
  $("title").textContent = api.info.title;
  $("service").textContent = `version ${api.info.version}`;
  $("summary").replaceChildren(...spans(api.info.summary || api.info.description || ""));
  const rooms = new Map();
  const contents = make("ul");
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, about] of Object.entries(methods)) {
      const tag = about.tags?.[0] || "other";
      if (!rooms.has(tag)) rooms.set(tag, make("section", {}, make("h2", { textContent: tag })));
      rooms.get(tag).append(operation(path, method, about));
      const link = make("a", { href: `#${method}-${path}` }, make("code", { textContent: `${method.toUpperCase()} ${path}` }));
      contents.append(make("li", {}, link, make("span", { textContent: about.summary || "" })));
    }
  }
  $("contents").replaceChildren(contents);
  $("operations").replaceChildren(...rooms.values());
  const documents = Object.entries(api.components?.schemas || {}).filter(([, schema]) => !schema.enum);
  $("documents").hidden = !documents.length;
  $("documents").append(...documents.map(([name, schema]) => properties(name, schema)));
  if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
}

$("key-form").addEventListener("submit", (event) => event.preventDefault());
$("key").value = sessionStorage.getItem(KEY) || "";
$("key").addEventListener("input", () => {
  if ($("key").value.trim()) sessionStorage.setItem(KEY, $("key").value.trim());
  else sessionStorage.removeItem(KEY);
  for (const form of document.querySelectorAll("form.try")) form.dispatchEvent(new Event("input"));
});

try {
  const answer = await fetch("openapi.json");
  api = await answer.json();
  draw();
} catch (error) {
  $("service").textContent = `/openapi.json could not be read: ${error.message}`;
}
