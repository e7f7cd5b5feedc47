// The view in the address, and files of what is shown.

const code = (token) => {
  if (token < PREFIX) return token ? `r${token}` : "cls";
  return `${Math.floor((token - PREFIX) / COLUMNS)},${(token - PREFIX) % COLUMNS}`;
};

function tokenOf(text) {
  if (text === "cls") return PREFIX ? 0 : null;
  const register = /^r(\d+)$/.exec(text);
  if (register) return register[1] < PREFIX ? Number(register[1]) : null;
  const [, row, column] = /^(\d+),(\d+)$/.exec(text ?? "") ?? [];
  return row < ROWS && column < COLUMNS ? PREFIX + row * COLUMNS + Number(column) : null;
}

/** The view as the fragment of an address. */
function fragment() {
  const parts = {
    layer: layers[view.layer].number,
    head: view.head === MEAN ? "mean" : view.head,
    token: code(view.kept),
    ...(isOn("column") && { direction: "to" }),
    ...(relevant() && { direction: "relevance" }),
    ...(isOn("log") && { scale: "log" }),
    ...(form.elements.limits.value !== "robust" && { limits: form.elements.limits.value }),
    ...(view.cursor !== null && { cursor: code(view.cursor) }),
    ...($("opacity").value !== "75" && { opacity: $("opacity").value }),
    ...(pinned?.place && { pin: pinCode(pinned.place) }),
  };
  return `#${Object.entries(parts).map(([key, value]) => `${key}=${value}`).join("&")}`;
}

function pinCode({ layer, head, token, column }) {
  return [layer, head === MEAN ? "mean" : head, code(token), column ? "to" : "from"].join(";");
}

let remembering;

/** Write the view into the address, after a pause. */
function remember() {
  clearTimeout(remembering);
  remembering = setTimeout(() => {
    try {
      history.replaceState(null, "", fragment());
    } catch {
      // The frame of a notebook has no address.
    }
  }, 150);
}

/** Show the view that the address describes. What it does not fit is ignored. */
function recall(hash) {
  clearTimeout(remembering);
  const given = new URLSearchParams(hash.slice(1));
  const layer = layers.findIndex((one) => String(one.number) === given.get("layer"));
  if (layer >= 0) view.layer = layer;
  view.head = headOf(given.get("head")) ?? view.head;
  view.kept = tokenOf(given.get("token")) ?? view.kept;
  view.cursor = tokenOf(given.get("cursor"));
  form.elements.column.value = given.get("direction") === "to" ? "yes" : "no";
  if (RELEVANCE && given.get("direction") === "relevance") form.elements.column.value = "relevance";
  form.elements.log.value = given.get("scale") === "log" ? "yes" : "no";
  form.elements.limits.value = LIMITS.includes(given.get("limits")) ? given.get("limits") : LIMITS[0];
  if (/^\d+$/.test(given.get("opacity"))) $("opacity").value = given.get("opacity");
  fade();
  show();
  if (given.get("pin")) recallPin(given.get("pin").split(";"));
}

function headOf(text) {
  if (text === "mean") return MEAN;
  return /^\d+$/.test(text) && Number(text) < about.heads ? Number(text) : null;
}

async function recallPin([number, headText, tokenText, direction]) {
  const layer = layers.find((one) => String(one.number) === number);
  const [head, token] = [headOf(headText), tokenOf(tokenText)];
  if (!layer || head === null || token === null) return;
  if (!layer.ready) await layer.load();
  const column = direction === "to";
  const line = layer.line(head, token, column);
  const toward = column ? "who looks at" : "where it looks:";
  const name = `${toward} ${nameOf(token)} · layer ${number}, ${headName(head)}`;
  const place = { layer: layer.number, head, token, column };
  if (line) setPin({ name, place, line: () => line, kind: form.elements.limits.value, log: isOn("log") });
}

// Files

function fileName(ending) {
  const title = document.querySelector("h1").textContent.replace(/\.\w+$/, "").replace(/[^\p{L}\p{N}_-]+/gu, "-");
  if (relevant()) return `${title}_relevance.${ending}`;
  const head = view.head === MEAN ? "mean" : `head${view.head}`;
  const parts = [title, `layer${layers[view.layer].number}`, head, code(chosen()).replace(",", "-")];
  return `${parts.join("_")}${isOn("column") ? "_to" : ""}.${ending}`;
}

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** One line for each token: position, name, patch, weight, the weight × N, and its error bound. */
function table() {
  if (relevant()) {
    const rows = [...RELEVANCE.line].map((value, token) => [...columnsOf(token), value].join(","));
    return ["position,token,row,column,relevance", ...rows, ""].join("\n");
  }
  const [layer, column] = [layers[view.layer], isOn("column")];
  const line = layer.line(view.head, chosen(), column);
  if (!line) return null;
  const rows = [...line].map((weight, token) => {
    const [query, key] = column ? [token, chosen()] : [chosen(), token];
    const doubt = layer.doubt(view.head, query, key, column);
    return [...columnsOf(token), weight, weight * TOKENS, doubt].join(",");
  });
  return ["position,token,row,column,weight,times_uniform,error_bound", ...rows, ""].join("\n");
}

/** Position, name, row and column of a token. */
function columnsOf(token) {
  const patch = token - PREFIX;
  if (patch < 0) return [token, nameOf(token), "", ""];
  return [token, "patch", Math.floor(patch / COLUMNS), patch % COLUMNS];
}

function saveTable() {
  const text = table();
  if (text) download(new Blob([text], { type: "text/csv" }), fileName("csv"));
}

/** The photograph, the map over it, the bar and the caption. */
function picture() {
  const wide = Math.max(320, Math.round(Math.sqrt(400_000 * RATIO)));
  const tall = Math.round(wide / RATIO);
  const sheet = document.createElement("canvas");
  [sheet.width, sheet.height] = [2 * wide + 60, tall + 130];
  const brush = sheet.getContext("2d");
  brush.fillStyle = "white";
  brush.fillRect(0, 0, sheet.width, sheet.height);
  brush.drawImage(image, 20, 20, wide, tall);
  brush.filter = "grayscale(1)"; // as on the page
  brush.drawImage(image, wide + 40, 20, wide, tall);
  brush.filter = "none";
  brush.imageSmoothingEnabled = false;
  brush.globalAlpha = $("opacity").value / 100;
  brush.drawImage(canvas, wide + 40, 20, wide, tall);
  brush.globalAlpha = 1;
  frame(brush, 20, wide, tall);
  brush.drawImage($("bar").querySelector("canvas"), wide + 40, tall + 32, wide, 12);
  captions(brush, wide, tall);
  return sheet;
}

/** A square around the chosen patch. */
function frame(brush, left, wide, tall) {
  const patch = chosen() - PREFIX;
  if (patch < 0) return;
  const [across, down] = [wide / COLUMNS, tall / ROWS];
  for (const [colour, width] of [["black", 6], ["#ffb000", 3]]) {
    brush.strokeStyle = colour;
    brush.lineWidth = width;
    brush.strokeRect(left + (patch % COLUMNS) * across, 20 + Math.floor(patch / COLUMNS) * down, across, down);
  }
}

function captions(brush, wide, tall) {
  brush.fillStyle = "black";
  brush.font = "14px system-ui, sans-serif";
  brush.fillText($("low").textContent, wide + 40, tall + 62);
  brush.textAlign = "right";
  brush.fillText(`${$("high").textContent} ${$("unit").textContent}`, 2 * wide + 40, tall + 62);
  brush.textAlign = "left";
  const title = document.querySelector("h1").textContent;
  const what = relevant() ? `Relevance ${$("caption").textContent}` : $("caption").textContent;
  const lines = [`${title} · ${what}`, document.querySelector("header p").textContent];
  if ($("warning")) lines.push($("warning").textContent);
  lines.forEach((text, i) => brush.fillText(text, 20, tall + 80 + 18 * i, 2 * wide + 20));
}

function savePicture() {
  picture().toBlob((blob) => download(blob, fileName("png")));
}

async function copyLink() {
  const text = location.href.split("#")[0] + fragment();
  try {
    await navigator.clipboard.writeText(text);
    $("link").textContent = "Copied";
  } catch {
    prompt("The address of this view", text);
  }
  setTimeout(() => ($("link").textContent = "Copy link"), 1500);
}

