// A second model, B, beside the model of the page, A: its map stands where a pinned one does.

const other = about.other && { ...about.other, tokens: about.other.prefix + ROWS * COLUMNS };
const theirs = other ? other.layers.map((layer) => new Layer(layer, other.tokens, document, "b-")) : [];

/** The token of B for one of A, or null: patches at one place, registers by their numbers. */
function inOther(token) {
  if (token >= PREFIX) return token - PREFIX + other.prefix;
  return token < other.prefix ? token : null;
}

/** The layer of B beside the one that is shown: of the same number, or as deep in its model. */
function layerOfOther() {
  const last = Math.max(layers.length - 1, 1);
  const alike = theirs.length === layers.length ? theirs.find((one) => one.number === layers[view.layer].number) : null;
  return alike ?? theirs[Math.round((view.layer * (theirs.length - 1)) / last)];
}

/** A line of B over the tokens of A, in the unit of A: a share of attention times its tokens. */
function lineOfOther() {
  const layer = layerOfOther();
  if (!layer.ready) {
    layer.load().then(show, cannotRead);
    return null;
  }
  const token = inOther(chosen());
  const line = token === null ? null : layer.line(view.head, token, isOn("column"));
  if (!line) return null;
  const unit = other.tokens / TOKENS;
  return Float64Array.from({ length: TOKENS }, (_, one) => (line[inOther(one)] ?? 0) * unit);
}

/** Show B, or remove it. */
function showOther() {
  if (pinned?.isModel) return setPin(null);
  const found = new Set(other.outliers.map((token) => token - other.prefix + PREFIX));
  const outliers = () => ($("outliers").checked ? found : NONE);
  const name = () => `B: layer ${layerOfOther().number}, ${headName()}`;
  setPin({ isModel: true, name, line: lineOfOther, outliers });
}

function beginModels() {
  $("model-b").hidden = !other;
  if (!other) return;
  $("model-b").addEventListener("click", showOther);
  showOther();
}
