// A pinned map, and what differs from it.

let pinned = null;
const pinnedSheet = sheet($("pinned"));
const differenceSheet = sheet($("difference"));

/** Keep the present map beside those that follow, or remove it. */
function pin() {
  const layer = layers[view.layer];
  const line = layer.ready ? layer.line(view.head, chosen(), isOn("column")) : null;
  if (relevant() || (!pinned && !line)) return;
  if (pinned?.isModel) pinned = null;
  const [kind, log] = [form.elements.limits.value, isOn("log")];
  const toward = isOn("column") ? "who looks at" : "where it looks:";
  const name = `${toward} ${nameOf(chosen())} · layer ${layer.number}, ${headName()}`;
  const place = { layer: layer.number, head: view.head, token: chosen(), column: isOn("column") };
  setPin(pinned ? null : { name, place, line: () => line, kind, log });
}

function setPin(next) {
  pinned = next;
  const isModel = Boolean(pinned?.isModel);
  $("pin").setAttribute("aria-pressed", Boolean(pinned) && !isModel);
  $("pin").textContent = pinned && !isModel ? "Unpin" : "Pin";
  $("model-b").setAttribute("aria-pressed", isModel);
  $("compare-title").textContent = isModel ? "Model B, and its difference from A" : "Difference from the pinned map";
  $("pinned-caption").textContent = isModel ? "B" : "pinned";
  $("difference-caption").textContent = isModel ? "B − A" : "this map − pinned";
  show();
  fitWindow();
}

/** Draw the pinned map, and how it differs. A second model has the limits of the map. */
function compare(line, limits) {
  if (!pinned) return;
  const isModel = Boolean(pinned.isModel);
  const other = pinned.line();
  $("pinned-name").textContent = isModel ? pinned.name() : pinned.name;
  if (isModel) paint(pinnedSheet, other, limits, isOn("log"));
  else paint(pinnedSheet, other, other && limitsOf([other], pinned.kind, pinned.log, pinned.outliers?.()), pinned.log);
  const both = Boolean(line && other);
  const sign = isModel ? -1 : 1;
  const difference = both ? line.map((weight, i) => sign * (weight - other[i])) : new Float64Array(TOKENS);
  const [low, high] = extremesOf(difference);
  const most = Math.max(-low, high, 0);
  paintDifference(differenceSheet, difference, most);
  put("difference-high", most, `+${times(most)} ×`);
  put("difference-low", -most, `${times(-most)} ×`);
  $("difference-sentence").textContent = both ? differenceInWords(difference, low, high) : "Not kept on this page.";
}

function differenceInWords(difference, low, high) {
  const where = (value) => nameOf(PREFIX + difference.subarray(PREFIX).indexOf(value));
  const half = difference.reduce((sum, one) => sum + Math.abs(one), 0) / 2;
  const moved = isOn("column") ? "" : ` ${(100 * half).toFixed(1)} % of the attention is elsewhere.`;
  const from = pinned.isModel ? "A" : "the pinned map";
  return `Most above ${from}: ${where(high)} (${times(high)} ×). Most below: ${where(low)} (${times(low)} ×).${moved}`;
}

// Another image: the page of the same model and grid that the reader opens.

async function openPage(file) {
  try {
    const page = new DOMParser().parseFromString(await file.text(), "text/html");
    await pinPage(page);
  } catch (error) {
    alert(`${file.name} cannot be compared: ${error.message}`);
  }
}

async function pinPage(page) {
  const element = page.getElementById("about");
  if (!element) throw new Error("it is no page of this program.");
  const other = JSON.parse(element.textContent);
  if (`${other.grid} ${other.prefix}` !== `${about.grid} ${about.prefix}`) {
    throw new Error(`its grid is ${other.grid.join(" × ")}, and this one's ${about.grid.join(" × ")}.`);
  }
  const theirs = new Map(other.layers.map((one) => [one.layer, new Layer(one, TOKENS, page)]));
  const name = page.querySelector("h1").textContent;
  const line = () => {
    const layer = theirs.get(layers[view.layer].number);
    if (layer && !layer.ready) layer.load().then(show, cannotRead);
    return layer?.ready ? layer.line(view.head, chosen(), isOn("column")) : null;
  };
  const found = new Set(other.outliers);
  const outliers = () => ($("outliers").checked ? found : NONE);
  setPin({ name: `the same token, layer and head of ${name}`, line, outliers, kind: "robust", log: false });
}

function bars() {
  const brush = $("difference-bar").querySelector("canvas").getContext("2d");
  const colours = brush.createImageData(1, 255);
  const words = new Uint32Array(colours.data.buffer);
  for (let i = 0; i < 255; i++) words[i] = diverging(1 - i / 127);
  brush.putImageData(colours, 0, 0);
}

bars();

