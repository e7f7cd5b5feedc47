// What is shown: the state, the maps and their texts.

const about = JSON.parse(document.getElementById("about").textContent);
const [ROWS, COLUMNS] = about.grid;
const PREFIX = about.prefix;
const TOKENS = PREFIX + ROWS * COLUMNS;
const VIRIDIS = fromBase64(about.viridis);
const OUTLIERS = new Set(about.outliers);
const layers = about.layers.map((layer) => new Layer(layer, TOKENS, document));
const LIMITS = ["robust", "shared", "each"];
// The relevance of every token for a target, if the page has one.
const RELEVANCE = about.relevance && { ...about.relevance, line: Float64Array.from(about.relevance.values) };

const $ = (id) => document.getElementById(id);
const form = $("controls");
const canvas = $("map").querySelector("canvas");
const clamp = (value, least, most) => Math.min(Math.max(value, least), most);
const isOn = (name) => form.elements[name].value === "yes";
const relevant = () => Boolean(RELEVANCE) && form.elements.column.value === "relevance";

// `kept` is the token that was chosen, `preview` the one under the pointer, if there is one.
const view = { layer: layers.length - 1, head: MEAN, kept: about.token, preview: null, cursor: null };
const chosen = () => view.preview ?? view.kept;

function nameOf(token) {
  if (token === null) return "–";
  if (token < PREFIX) return token ? `register ${token}` : "CLS";
  const patch = token - PREFIX;
  const place = `patch (${Math.floor(patch / COLUMNS)}, ${patch % COLUMNS})`;
  return OUTLIERS.has(token) ? `${place}, outlier` : place;
}

const headName = (head = view.head) => (head === MEAN ? "mean of heads" : `head ${head}`);

function number(weight, digits = 4) {
  if (weight === 0) return "0";
  return Math.abs(weight) < 1e-4 ? weight.toExponential(digits - 1) : weight.toPrecision(digits);
}

/** In units of what each token gets if attention is spread evenly. */
function times(weight, digits = 3) {
  const value = weight * TOKENS;
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1000 || size < 0.001 ? value.toExponential(digits - 1) : value.toPrecision(digits);
  return text.replace(/^-/, "−");
}

/** A number of the map: relevance has no unit. */
const amount = (weight) => (relevant() ? number(weight, 3) : `${times(weight)} ×`);

function put(id, value, text) {
  $(id).value = value;
  $(id).textContent = text;
}

// Texts

function describe(layer, line, limits) {
  const unit = relevant() ? "relevance" : "× uniform";
  $("unit").textContent = unit;
  $("weight-role").textContent = relevant() ? "Relevance" : "Weight";
  $("share").hidden = relevant();
  if (relevant()) return describeRelevance(line, limits);
  const column = isOn("column");
  $("direction").textContent = column ? "Who looks at it" : "Where it looks";
  $("caption").textContent = `${other ? "A · " : ""}${nameOf(chosen())} · layer ${layer.number}, ${headName()}`;
  $("token-role").textContent = column ? "Key" : "Query";
  $("cursor-role").textContent = column ? "Query, under the cursor" : "Key, under the cursor";
  $("token").textContent = nameOf(chosen());
  $("cursor").textContent = nameOf(view.cursor);
  const weight = line && view.cursor !== null ? line[view.cursor] : null;
  const doubt = weight === null ? null : layer.doubt(view.head, ...pair(column), column);
  put("times", weight === null ? "" : weight * TOKENS, weight === null ? "–" : `${times(weight)} ×`);
  put("weight", weight ?? "", weight === null ? (line ? "–" : "not kept") : number(weight));
  put("doubt", doubt ?? "", doubt === null ? "" : `± ${number(doubt, 2)}`);
  put("low", line ? limits[0] : "", line ? times(limits[0]) : "");
  put("high", line ? limits[1] : "", line ? times(limits[1]) : "");
  $("above").hidden = !line || extremesOf(line)[1] <= limits[1];
  $("missing").hidden = Boolean(line);
  $("missing").textContent = line ? "" : lacking(layer, column);
  $("sentence").textContent = line ? inOneSentence(line, layer, column, limits) : lacking(layer, column);
  announce(weight, column);
}

function describeRelevance(line, limits) {
  $("direction").textContent = "Relevance";
  $("caption").textContent = relevanceName();
  $("token-role").textContent = "Target";
  $("cursor-role").textContent = "Under the cursor";
  $("token").textContent = RELEVANCE.target;
  $("cursor").textContent = nameOf(view.cursor);
  const value = view.cursor === null ? null : line[view.cursor];
  put("times", value ?? "", value === null ? "–" : amount(value));
  put("weight", "", "");
  put("doubt", "", "");
  put("low", limits[0], amount(limits[0]));
  put("high", limits[1], amount(limits[1]));
  $("above").hidden = extremesOf(line)[1] <= limits[1];
  $("missing").hidden = true;
  $("sentence").textContent = relevanceInOneSentence(line, limits);
  const text = value === null ? $("sentence").textContent : `${nameOf(view.cursor)}: relevance ${amount(value)}`;
  clearTimeout(announcing);
  announcing = setTimeout(() => ($("live").textContent = text), 300);
}

const relevanceName = () => `for ${RELEVANCE.target}, by ${RELEVANCE.method} (${RELEVANCE.row}; ${RELEVANCE.layers})`;

function relevanceInOneSentence(line, limits) {
  const patches = line.subarray(PREFIX);
  const sum = (part) => part.reduce((total, one) => total + one, 0);
  const whole = sum(patches); // that of CLS for itself is much larger
  if (!(whole > 0)) return `Relevance ${relevanceName()}: zero at every patch. The target does not depend on this row.`;
  const most = Math.max(...patches);
  const share = (part) => `${((100 * sum(part)) / whole).toFixed(1)} %`;
  const above = patches.reduce((count, one) => count + (one > limits[1]), 0);
  const parts = [
    `Relevance ${relevanceName()}: highest at ${nameOf(PREFIX + patches.indexOf(most))} (${amount(most)})`,
    `the five highest patches hold ${share(highest(patches, Math.min(5, patches.length)))} of that of all patches`,
  ];
  if (above) parts.push(`${above} of ${patches.length} patches lie above the colours`);
  return `${parts.join("; ")}.`;
}

function lacking(layer, column) {
  const what = column ? "the column" : "the row";
  return (
    `Not kept on this page: ${what} of ${nameOf(chosen())}, ${headName()}. ` +
    `Kept of layer ${layer.number}: ${layer.kept}.`
  );
}

/** The map in words, for those who do not see it, and for those who do. */
function inOneSentence(line, layer, column, limits) {
  const patches = line.subarray(PREFIX);
  const high = patches.indexOf(Math.max(...patches));
  const sum = (part) => part.reduce((total, weight) => total + weight, 0);
  const top = highest(patches, Math.min(5, patches.length));
  const whole = sum(line);
  const above = patches.reduce((count, weight) => count + (weight > limits[1]), 0);
  const share = (part) => `${((100 * sum(part)) / (whole || 1)).toFixed(1)} %`;
  const holders = PREFIX > 1 ? "CLS and registers" : "CLS";
  const holding = `${PREFIX > 1 ? (column ? "give" : "hold") : column ? "gives" : "holds"} ${share(line.subarray(0, PREFIX))}`;
  const parts = [
    `${nameOf(chosen())}, layer ${layer.number}, ${headName()}: highest ` +
      `${column ? "from" : "at"} ${nameOf(PREFIX + high)} (${times(patches[high])} × uniform)`,
    `the five highest patches ${column ? "give" : "hold"} ${share(top)}`,
    ...(PREFIX ? [`${holders} ${holding}`] : []),
  ];
  if (column) parts.push(`it receives ${number(whole, 3)} in total (average: 1)`);
  if (above) parts.push(`${above} of ${patches.length} patches lie above the colours`);
  return `${parts.join("; ")}.`;
}

/** The query and the key of the weight that is shown. */
function pair(column) {
  return column ? [view.cursor, chosen()] : [chosen(), view.cursor];
}

let announcing;

/** Announce to screen readers after a pause, not at every step of the mouse. */
function announce(weight, column) {
  const [query, key] = pair(column);
  let text = $("sentence").textContent;
  if (weight !== null) {
    text = `${nameOf(query)} gives ${nameOf(key)} ${times(weight)} times uniform, ${number(weight)}`;
  }
  clearTimeout(announcing);
  announcing = setTimeout(() => ($("live").textContent = text), 300);
}

// Maps

function place(mark, token) {
  const patch = token - PREFIX;
  mark.toggleAttribute("hidden", token === null || patch < 0);
  if (token === null || patch < 0) return;
  mark.setAttribute("x", patch % COLUMNS);
  mark.setAttribute("y", Math.floor(patch / COLUMNS));
}

let waiting; // the small maps are drawn once a frame, however often the pointer moves

function show() {
  const layer = layers[view.layer];
  controls(layer);
  if (!layer.ready) {
    document.body.setAttribute("aria-busy", "true");
    layer.load().then(show, cannotRead);
    return;
  }
  document.body.removeAttribute("aria-busy");
  const [token, column, log] = [chosen(), isOn("column"), isOn("log")];
  const kind = form.elements.limits.value;
  const attention = layer.line(view.head, token, column);
  const lines = attention ? layer.lines(token, column) : [];
  const together = attention && kind === "shared" && limitsOf(lines.length ? lines : [attention], kind, log);
  const line = relevant() ? RELEVANCE.line : attention;
  const limits = relevant()
    ? limitsOf([line], kind === "shared" ? "each" : kind, log)
    : together || (line && limitsBeside(line, kind, log));
  paint(mapSheet, line, limits, log);
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => showHeads(layer, lines, attention, together, kind, log));
  cells.forEach((cell, one) => {
    paintCell(cell, line && line[one], limits, log);
    cell.setAttribute("aria-pressed", one === view.cursor);
  });
  chips.forEach((chip, one) => chip.setAttribute("aria-pressed", one === token));
  for (const mark of tokenMarks) place(mark, token);
  for (const mark of cursorMarks) place(mark, view.cursor);
  for (const group of outlierMarks) group.toggleAttribute("hidden", !$("outliers").checked);
  describe(layer, line, limits);
  $("pin").disabled = relevant(); // attention and relevance have no common unit
  $("compare").hidden = !pinned || relevant();
  if (!relevant()) compare(line, limits);
  remember();
  if (!performance.getEntriesByName("shown").length) {
    performance.mark("shown");
    fitWindow();
  }
}

/** The limits of a map. A second model beside it shares them. */
function limitsBeside(line, kind, log) {
  const beside = pinned?.isModel ? pinned.line() : null;
  const own = limitsOf([line], kind, log);
  if (!beside) return own;
  const theirs = limitsOf([beside], kind, log, pinned.outliers());
  return [Math.min(own[0], theirs[0]), Math.max(own[1], theirs[1])];
}

function cannotRead(error) {
  $("missing").hidden = false;
  $("missing").textContent = `This page needs a newer browser (Chrome 103, Firefox 113, Safari 16.4): ${error}`;
}

function paintCell(button, weight, limits, log) {
  const none = weight === null;
  const colour = none ? 0 : shade(weight, limits, log);
  const [red, green, blue] = VIRIDIS.subarray(3 * colour, 3 * colour + 3);
  button.style.background = none ? "" : `rgb(${red} ${green} ${blue})`;
  button.style.color = none ? "" : colour > 150 ? "black" : "white";
  const shown = button.querySelector("data");
  shown.value = none ? "" : weight;
  shown.textContent = none ? "–" : amount(weight);
}

/** All heads of the layer, small. */
function showHeads(layer, lines, line, together, kind, log) {
  $("side-layer").textContent = layer.number;
  $("side-scale").textContent = relevant() ? `Attention of ${nameOf(chosen())}. ` : "";
  $("side-scale").textContent +=
    lines.length || !line
      ? together
        ? "Click one to show it. One scale for all."
        : "Click one to show it. Each on its own scale."
      : "Only the mean of heads is kept for this token.";
  for (const { head, button, sheet } of tiles) {
    const own = head === MEAN ? (lines.length ? meanOf(lines) : line) : lines[head];
    paint(sheet, own ?? null, own && (together || limitsOf([own], kind, log)), log);
    button.setAttribute("aria-pressed", head === view.head);
    button.classList.toggle("absent", !own);
  }
}

function controls(layer) {
  const lone = view.head === MEAN;
  $("layer").value = view.layer;
  $("layer-value").textContent = layer.number;
  $("layer").setAttribute("aria-valuetext", `layer ${layer.number}, kept: ${layer.kept}`);
  $("mean").checked = lone;
  $("head").disabled = lone;
  if (!lone) $("head").value = view.head;
  $("head-value").textContent = lone ? "mean is on" : view.head;
  $("head").setAttribute("aria-valuetext", headName());
  const column = isOn("column");
  mark($("layers-kept"), layers, (one) => one.has(view.head, chosen(), column));
  mark($("heads-kept"), headNumbers, (head) => layer.has(head, chosen(), column));
}

/** Below a slider: which of its steps have a map of this token. Nothing if all have. */
function mark(strip, steps, has) {
  const there = steps.map(has);
  strip.hidden = there.every(Boolean);
  if (strip.hidden) return;
  strip.title = "Dark: kept on this page for this token";
  while (strip.children.length < there.length) strip.append(document.createElement("i"));
  there.forEach((one, i) => strip.children[i].classList.toggle("there", one));
}

// Elements that are created once

function button(parent, token, action) {
  const made = parent.appendChild(document.createElement("button"));
  made.type = "button";
  made.textContent = token ? `R${token}` : "CLS";
  made.setAttribute("aria-label", nameOf(token));
  made.addEventListener("click", () => action(token));
  return made;
}

function cell(token) {
  const made = button($("cells"), token, point);
  made.append(" ", document.createElement("data"));
  made.removeAttribute("aria-label"); // its text includes the weight
  made.addEventListener("pointerenter", () => point(token));
  made.addEventListener("focus", () => point(token));
  return made;
}

function tile(head) {
  const made = $("heads").appendChild(document.createElement("button"));
  const small = made.appendChild(document.createElement("canvas"));
  made.type = "button";
  made.append(head === MEAN ? "mean" : head);
  made.setAttribute("aria-label", headName(head));
  [small.width, small.height] = [COLUMNS, ROWS];
  made.addEventListener("click", () => {
    if (relevant()) form.elements.column.value = "no";
    turnHead(head);
  });
  return { head, button: made, sheet: sheet(small) };
}

function rectangle(parent, kind) {
  const made = document.createElementNS(parent.namespaceURI, "rect");
  made.setAttribute("class", kind);
  made.setAttribute("width", 1);
  made.setAttribute("height", 1);
  return parent.appendChild(made);
}

function marks(kinds) {
  const sheets = [...document.querySelectorAll(".stage svg")];
  return sheets.flatMap((one) => kinds.map((kind) => rectangle(one, kind)));
}

/** Twice for each: a dark line under a light one is seen on every colour. */
function markOutliers(parent) {
  const group = parent.appendChild(document.createElementNS(parent.namespaceURI, "g"));
  for (const token of OUTLIERS) {
    place(rectangle(group, "under"), token);
    place(rectangle(group, "outlier"), token);
  }
  return group;
}

const headNumbers = [...Array(about.heads).keys()];
const prefix = [...Array(PREFIX).keys()];
const mapSheet = sheet(canvas);
const chips = prefix.map((token) => button($("chips"), token, choose));
const cells = prefix.map(cell);
const tiles = [MEAN, ...headNumbers].map(tile);
const outlierMarks = [...document.querySelectorAll(".stage svg")].map(markOutliers);
const cursorMarks = marks(["under", "cursor"]);
const tokenMarks = marks(["under", "token"]);

// Sizes

const image = $("photo").querySelector("img");
const RATIO = image.getAttribute("width") / image.getAttribute("height");

/** Make the pictures as high as the window leaves room for, and the heads as large as fits. */
function fitWindow() {
  const narrow = getComputedStyle($("side")).gridColumnStart !== "auto";
  for (let again = 0; again < 2; again++) fitPictures(); // texts wrap in other widths
  const box = $("heads").getBoundingClientRect();
  const end = Math.max(lowest(), innerHeight - scrollY - below());
  const across = tilesAcross(box.width, narrow ? Infinity : Math.max(end - box.top, 72));
  $("heads").style.setProperty("--across", across);
}

function fitPictures() {
  const stage = $("photo").getBoundingClientRect();
  const rest = stage.top + scrollY + (lowest() - stage.bottom) + below();
  const tall = Math.max(innerHeight - rest, innerHeight / 3, 112);
  document.documentElement.style.setProperty("--tall", `${tall}px`);
}

/** The lower end of what is below the pictures. */
const lowest = () => Math.max(...[$("steps"), $("cells")].map((it) => it.getBoundingClientRect().bottom));

/** The height of what follows, with its margins. */
const below = () => $("readout").getBoundingClientRect().height + 20;

/** The fewest tiles in a row with which all rows fit: so they are largest. */
function tilesAcross(width, height) {
  const tall = (across) => (width / across - 12) / RATIO + 32;
  const endless = height === Infinity; // as many rows as it takes, each lower than the window
  const fits = (across) =>
    endless ? tall(across) <= 0.45 * innerHeight : Math.ceil(tiles.length / across) * tall(across) <= height;
  let across = endless ? clamp(Math.round(width / 90), 1, tiles.length) : 1;
  while (across < 3 * tiles.length && !fits(across)) across++;
  return across;
}

function begin() {
  document.documentElement.style.setProperty("--ratio", RATIO);
  $("map").querySelector("img").src = image.src;
  $("layer").max = layers.length - 1;
  $("layer").disabled = layers.length < 2;
  $("head").max = Math.max(about.heads - 1, 0);
  $("head").value = 0;
  $("mean").disabled = about.heads < 2;
  $("outliers").disabled = !OUTLIERS.size;
  $("outliers-found").textContent = about.outliersFound;
  const bar = $("bar").querySelector("canvas").getContext("2d");
  const colours = bar.createImageData(256, 1);
  new Uint32Array(colours.data.buffer).set(PALETTE);
  bar.putImageData(colours, 0, 0);
  recall(location.hash);
  beginModels();
  addEventListener("resize", fitWindow);
  addEventListener("hashchange", ({ newURL }) => recall(new URL(newURL).hash));
  loadOthers();
}

/** Read the other layers while nothing else happens. */
async function loadOthers() {
  const idle = globalThis.requestIdleCallback ?? ((then) => setTimeout(then, 50));
  for (const layer of [...layers].reverse()) {
    if (layer.ready) continue;
    await new Promise((then) => idle(then));
    await layer.load();
  }
}

