
// Draw the chosen weights.

const about = JSON.parse(document.getElementById("about").textContent);
const [ROWS, COLUMNS] = about.grid;
const PREFIX = about.prefix;
const TOKENS = PREFIX + ROWS * COLUMNS;
const VIRIDIS = fromBase64(about.viridis);
const OUTLIERS = new Set(about.outliers);
const layers = about.layers.map((layer) => new Layer(layer, TOKENS));

const $ = (id) => document.getElementById(id);
const form = $("controls");
const canvas = $("map").querySelector("canvas");
const brush = canvas.getContext("2d", { willReadFrequently: true }); // the canvas is read and small: no GPU
const pixels = brush.createImageData(COLUMNS, ROWS);

const view = { layer: layers.length - 1, head: MEAN, token: about.token, cursor: null, held: false };

const isOn = (name) => form.elements[name].value === "yes";
const clamp = (value, least, most) => Math.min(Math.max(value, least), most);

function nameOf(token) {
  if (token === null) return "–";
  if (token === 0) return "CLS";
  if (token < PREFIX) return `register ${token}`;
  const patch = token - PREFIX;
  const place = `patch (${Math.floor(patch / COLUMNS)}, ${patch % COLUMNS})`;
  return OUTLIERS.has(token) ? `${place}, outlier` : place;
}

function number(weight, digits = 4) {
  if (weight === 0) return "0";
  return weight < 1e-4 ? weight.toExponential(digits - 1) : weight.toPrecision(digits);
}

// Colours

/** The minimum and maximum of the patches; for logarithms the minimum above zero. */
function limitsOf(lines, log) {
  let low = Infinity;
  let high = -Infinity;
  for (const line of lines) {
    for (let i = PREFIX; i < line.length; i++) {
      if (line[i] < low && !(log && line[i] <= 0)) low = line[i];
      if (line[i] > high) high = line[i];
    }
  }
  return [Math.min(low, high), high];
}

function shade(weight, [low, high], log) {
  if (!(high > low) || weight <= low) return 0;
  const share = log ? Math.log(weight / low) / Math.log(high / low) : (weight - low) / (high - low);
  return clamp(Math.floor(share * 256), 0, 255);
}

function paint(line, limits, log) {
  brush.clearRect(0, 0, COLUMNS, ROWS);
  if (!line) return;
  for (let i = 0; i < ROWS * COLUMNS; i++) {
    const colour = 3 * shade(line[PREFIX + i], limits, log);
    pixels.data[4 * i] = VIRIDIS[colour];
    pixels.data[4 * i + 1] = VIRIDIS[colour + 1];
    pixels.data[4 * i + 2] = VIRIDIS[colour + 2];
    pixels.data[4 * i + 3] = 255;
  }
  brush.putImageData(pixels, 0, 0);
}

function paintCell(button, weight, limits, log) {
  const colour = weight === null ? 0 : shade(weight, limits, log);
  const [red, green, blue] = VIRIDIS.slice(3 * colour, 3 * colour + 3);
  button.style.background = weight === null ? "" : `rgb(${red} ${green} ${blue})`;
  button.style.color = weight === null ? "" : colour > 150 ? "black" : "white";
  button.querySelector("data").value = weight === null ? "" : weight;
  button.querySelector("data").textContent = weight === null ? "–" : number(weight, 3);
}

// Texts

function describe(layer, line, limits) {
  const column = isOn("column");
  const head = view.head === MEAN ? "mean of heads" : `head ${view.head}`;
  $("direction").textContent = column ? "Attention to this token" : "Attention from this token";
  $("caption").textContent = `${nameOf(view.token)} · layer ${layer.number}, ${head} · ${held(line)}`;
  $("token-role").textContent = column ? "Key" : "Query";
  $("cursor-role").textContent = column ? "Query, under the cursor" : "Key, under the cursor";
  $("token").textContent = nameOf(view.token);
  $("cursor").textContent = nameOf(view.cursor);
  const weight = line && view.cursor !== null ? line[view.cursor] : null;
  $("weight").value = weight === null ? "" : weight;
  $("weight").textContent = weight === null ? (line ? "–" : "not kept") : number(weight);
  $("doubt").value = weight === null ? "" : layer.doubt(view.head, ...pair(column));
  $("doubt").textContent = weight === null ? "" : `± ${number(Number($("doubt").value), 2)}`;
  for (const [id, limit] of [["low", 0], ["high", 1]]) {
    $(id).value = line ? limits[limit] : "";
    $(id).textContent = line ? number(limits[limit], 3) : "";
  }
  $("missing").hidden = Boolean(line);
  const what = column ? "the column" : "the row";
  $("missing").textContent = line
    ? ""
    : `Not kept on this page: ${what} of ${nameOf(view.token)}, ${head}. ` +
      `Kept of layer ${layer.number}: ${layer.kept}.`;
  announce(weight, column);
}

function held(line) {
  if (!line) return "not kept";
  const sum = (part) => part.reduce((total, weight) => total + weight, 0);
  if (isOn("column")) return `receives ${number(sum(line), 3)} in total (average: 1)`;
  const holders = PREFIX > 1 ? "CLS and registers hold" : "CLS holds";
  return `${holders} ${(100 * sum(line.subarray(0, PREFIX))).toFixed(1)} %`;
}

/** The query and the key of the weight that is shown. */
function pair(column) {
  return column ? [view.cursor, view.token] : [view.token, view.cursor];
}

let announcing;

/** Announce to screen readers after a pause, not at every step of the mouse. */
function announce(weight, column) {
  const [query, key] = pair(column);
  let text = `${nameOf(view.token)} chosen`;
  if (weight !== null) text = `${nameOf(query)} gives ${nameOf(key)} ${number(weight)}`;
  if ($("missing").textContent) text = $("missing").textContent;
  clearTimeout(announcing);
  announcing = setTimeout(() => ($("live").textContent = text), 300);
}

function place(mark, token) {
  const patch = token - PREFIX;
  mark.toggleAttribute("hidden", token === null || patch < 0);
  if (token === null || patch < 0) return;
  mark.setAttribute("x", patch % COLUMNS);
  mark.setAttribute("y", Math.floor(patch / COLUMNS));
}

function show() {
  const layer = layers[view.layer];
  const column = isOn("column");
  const log = isOn("log");
  const line = layer.line(view.head, view.token, column);
  const shared = line && isOn("shared") ? layer.lines(view.token, column) : [line];
  const limits = line && limitsOf(shared, log);
  paint(line, limits, log);
  cells.forEach((cell, token) => {
    paintCell(cell, line && line[token], limits, log);
    cell.setAttribute("aria-pressed", token === view.cursor);
  });
  chips.forEach((chip, token) => chip.setAttribute("aria-pressed", token === view.token));
  for (const mark of tokenMarks) place(mark, view.token);
  for (const mark of cursorMarks) place(mark, view.cursor);
  for (const group of outlierMarks) group.toggleAttribute("hidden", !$("outliers").checked);
  $("release").hidden = !view.held;
  controls(layer);
  describe(layer, line, limits);
}

function controls(layer) {
  const lone = view.head === MEAN;
  $("layer").value = view.layer;
  $("layer-value").textContent = layer.number;
  $("layer").setAttribute("aria-valuetext", `layer ${layer.number}`);
  $("mean").checked = lone;
  $("head").disabled = lone;
  if (!lone) $("head").value = view.head;
  $("head-value").textContent = lone ? "mean" : view.head;
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

function rectangle(parent, kind) {
  const made = document.createElementNS(parent.namespaceURI, "rect");
  made.setAttribute("class", kind);
  made.setAttribute("width", 1);
  made.setAttribute("height", 1);
  return parent.appendChild(made);
}

function marks(kinds) {
  const sheets = [...document.querySelectorAll(".stage svg")];
  return sheets.flatMap((sheet) => kinds.map((kind) => rectangle(sheet, kind)));
}

function markOutliers(sheet) {
  const group = sheet.appendChild(document.createElementNS(sheet.namespaceURI, "g"));
  for (const token of OUTLIERS) place(rectangle(group, "outlier"), token);
  return group;
}

const prefix = [...Array(PREFIX).keys()];
const chips = prefix.map((token) => button($("chips"), token, choose));
const cells = prefix.map(cell);
const outlierMarks = [...document.querySelectorAll(".stage svg")].map(markOutliers);
const cursorMarks = marks(["under", "cursor"]);
const tokenMarks = marks(["under", "token"]);

function begin() {
  const image = $("photo").querySelector("img");
  const [width, height] = ["width", "height"].map((side) => image.getAttribute(side));
  const ratio = width / height;
  document.documentElement.style.setProperty("--ratio", ratio);
  document.body.classList.toggle("wide", ratio > 2.4);
  document.body.classList.toggle("tall", ratio < 0.8);
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
  for (let i = 0; i < 256; i++) colours.data.set([...VIRIDIS.slice(3 * i, 3 * i + 3), 255], 4 * i);
  bar.putImageData(colours, 0, 0);
  fade();
  show();
}
