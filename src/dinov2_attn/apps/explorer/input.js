
// Mouse, touch and keyboard.

function tokenAt(stage, event) {
  const box = stage.getBoundingClientRect();
  const across = Math.floor(((event.clientX - box.left) / box.width) * COLUMNS);
  const down = Math.floor(((event.clientY - box.top) / box.height) * ROWS);
  return PREFIX + clamp(down, 0, ROWS - 1) * COLUMNS + clamp(across, 0, COLUMNS - 1);
}

/** Keep a token: it stays when the pointer leaves. */
function choose(token) {
  $("hint").hidden = true;
  if (token === view.kept && view.preview === null) return;
  view.kept = token;
  view.preview = null;
  show();
}

/** Show a token as long as the pointer is on it. */
function preview(token) {
  if (token === view.preview) return;
  view.preview = token;
  show();
}

function point(token) {
  if (token === view.cursor) return;
  view.cursor = token;
  show();
}

function step(token, [down, across]) {
  if (token === null) return view.kept;
  if (token < PREFIX) return clamp(token + Math.sign(down + across), 0, TOKENS - 1);
  const row = Math.floor((token - PREFIX) / COLUMNS) + down;
  const column = clamp(((token - PREFIX) % COLUMNS) + across, 0, COLUMNS - 1);
  if (row < 0) return PREFIX ? PREFIX - 1 : token;
  return PREFIX + Math.min(row, ROWS - 1) * COLUMNS + column;
}

function chooseCursor() {
  if (view.cursor !== null) choose(view.cursor);
}

$("photo").addEventListener("pointermove", (event) => {
  if (event.pointerType === "touch") return;
  const token = tokenAt($("photo"), event);
  hint(event, token);
  preview(token === view.kept ? null : token);
});
$("photo").addEventListener("pointerleave", () => {
  $("hint").hidden = true;
  preview(null);
});
$("photo").addEventListener("click", (event) => choose(tokenAt($("photo"), event)));

/** Say beside the pointer how to keep what it shows. */
function hint({ clientX, clientY }, token) {
  const box = $("photo").getBoundingClientRect();
  const isLeft = clientX - box.left < box.width / 2;
  $("hint").hidden = token === view.kept;
  $("hint").style.left = isLeft ? `${clientX - box.left + 16}px` : "auto";
  $("hint").style.right = isLeft ? "auto" : `${box.right - clientX + 12}px`;
  $("hint").style.top = `${clientY - box.top + 14}px`;
}

$("map").addEventListener("pointermove", (event) => {
  if (event.pointerType !== "touch") point(tokenAt($("map"), event));
});
$("map").addEventListener("click", (event) => point(tokenAt($("map"), event)));
$("map").addEventListener("dblclick", (event) => choose(tokenAt($("map"), event)));
$("from-here").addEventListener("click", chooseCursor);
$("steps").addEventListener("click", ({ target }) => {
  if (target.dataset.key) choose(step(view.kept, ARROWS[target.dataset.key]));
});

$("layer").addEventListener("input", ({ target }) => turn("layer", Number(target.value)));
$("head").addEventListener("input", ({ target }) => turn("head", Number(target.value)));
$("mean").addEventListener("input", toggleMean);
form.addEventListener("change", show);
form.addEventListener("submit", (event) => event.preventDefault());
$("opacity").addEventListener("input", fade);

$("pin").addEventListener("click", pin);
$("open").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", ({ target }) => {
  if (target.files[0]) openPage(target.files[0]);
  target.value = "";
});
$("link").addEventListener("click", copyLink);
$("png").addEventListener("click", savePicture);
$("csv").addEventListener("click", saveTable);
$("keys-button").addEventListener("click", () => $("keys").showModal());

function turn(what, value) {
  view[what] = clamp(value, 0, (what === "layer" ? layers.length : about.heads) - 1);
  show();
}

function turnHead(head) {
  view.head = head;
  show();
}

function toggleMean() {
  turnHead($("mean").checked ? MEAN : Number($("head").value));
}

function nextLimits() {
  const now = LIMITS.indexOf(form.elements.limits.value);
  form.elements.limits.value = LIMITS[(now + 1) % LIMITS.length];
  show();
}

function flip(name) {
  form.elements[name].value = isOn(name) ? "no" : "yes";
  show();
}

/** Show the relevance, or what was asked before: where the token looks. */
function showRelevance() {
  if (!RELEVANCE) return;
  form.elements.column.value = relevant() ? "no" : "relevance";
  show();
}

function fade() {
  canvas.style.opacity = $("opacity").value / 100;
  $("opacity-value").textContent = `${$("opacity").value} %`;
}

// Keys

const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

const LETTERS = {
  c: () => digit(0),
  m: () => !$("mean").disabled && $("mean").click(),
  r: () => flip("column"),
  t: showRelevance,
  l: () => flip("log"),
  s: nextLimits,
  p: pin,
  "?": () => $("keys").showModal(),
  o: () => !$("outliers").disabled && $("outliers").click(),
  "[": () => turn("layer", view.layer - 1),
  "]": () => turn("layer", view.layer + 1),
  ",": () => view.head !== MEAN && turn("head", view.head - 1),
  ".": () => view.head !== MEAN && turn("head", view.head + 1),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  const busy = event.target.closest("input, button, summary"); // these elements use the keys themselves
  const letter = $("letters").checked && LETTERS[event.key.toLowerCase()];
  if (event.key === "Escape") point(null);
  else if (event.key in ARROWS && !busy) arrow(event);
  else if (event.key === "Enter" && !busy) chooseCursor();
  else if (letter) letter();
  else if ($("letters").checked && /^\d$/.test(event.key)) digit(Number(event.key));
});

function arrow(event) {
  event.preventDefault(); // the page would scroll
  if (event.shiftKey) point(step(view.cursor, ARROWS[event.key]));
  else choose(step(view.kept, ARROWS[event.key]));
}

function digit(token) {
  if (token < PREFIX) choose(token);
}

begin();
