// Colours: limits of a map, and what is painted.

/** The minimum and maximum of the patches. */
function extremesOf(line) {
  let low = Infinity;
  let high = -Infinity;
  for (let i = PREFIX; i < line.length; i++) {
    if (line[i] < low) low = line[i];
    if (line[i] > high) high = line[i];
  }
  return [low, high];
}

/** Put the highest numbers of `line` into `top`, which is ascending. */
function collectHighest(line, top) {
  for (let i = 0; i < line.length; i++) {
    if (line[i] <= top[0]) continue;
    let at = 0;
    for (; at + 1 < top.length && top[at + 1] < line[i]; at++) top[at] = top[at + 1];
    top[at] = line[i];
  }
}

function highest(line, count) {
  const top = new Float64Array(count).fill(-Infinity);
  collectHighest(line, top);
  return top;
}

// The rule of limits is that of apps/viz/limits.py: pictures and page give a map the same ones.
const DECADES = 4;
const [ABOVE, ABOVE_SMALL, FEW] = [0.005, 0.02, 3];
const STANDS_OUT = 2;
const MOST = 2 / 3;
const NONE = new Set();

/** The outliers that have no part in limits: those that are marked. */
const spared = () => ($("outliers").checked ? OUTLIERS : NONE);

/** The patches that may set limits: all but the outliers, unless they are all. */
function counted(line, outliers) {
  const patches = line.subarray(PREFIX);
  if (!outliers.size || outliers.size === patches.length) return patches;
  return patches.filter((_, patch) => !outliers.has(PREFIX + patch));
}

/** Where robust colours end: at the highest patch, or below a few that stand out. */
function robustEnd(patches) {
  const count = patches.length;
  const above = Math.floor(Math.max(ABOVE * count, Math.min(FEW, ABOVE_SMALL * count)));
  const top = highest(patches, above + 1);
  const [usual, most] = [top[0], top[above]];
  if (!(usual > 0 && usual * STANDS_OUT < most)) return most;
  const sum = (total, weight) => total + weight;
  const held = top.filter((weight) => weight > usual).reduce(sum, 0);
  return held <= MOST * patches.reduce(sum, 0) ? usual : most;
}

/** Where the colours of maps begin and end: robust of one, of each one, or shared by several. */
function limitsOf(lines, kind, log, outliers = spared()) {
  const maps = lines.map((line) => counted(line, kind === "shared" ? NONE : outliers));
  const ends = maps.map((patches) => (kind === "robust" ? robustEnd(patches) : highest(patches, 1)[0]));
  const high = Math.max(...ends) || 1 / TOKENS;
  if (!log) return [0, high];
  const low = Math.max(leastAboveZero(maps, high), high / 10 ** DECADES);
  return [low, high > low ? high : 10 * low];
}

function leastAboveZero(maps, otherwise) {
  let least = Infinity;
  for (const patches of maps) for (const weight of patches) if (weight > 0 && weight < least) least = weight;
  return least === Infinity ? otherwise : least;
}

function shade(weight, [low, high], log) {
  if (!(high > low) || weight <= low) return 0;
  const share = log ? Math.log(weight / low) / Math.log(high / low) : (weight - low) / (high - low);
  return clamp(Math.floor(share * 256), 0, 255);
}

/** A sheet of one pixel a patch, that paints without a processor of graphics: it is small and read. */
function sheet(element) {
  const brush = element.getContext("2d", { willReadFrequently: true });
  const pixels = brush.createImageData(COLUMNS, ROWS);
  return { brush, pixels, words: new Uint32Array(pixels.data.buffer) };
}

function paint({ brush, pixels, words }, line, limits, log) {
  if (!line) return brush.clearRect(0, 0, COLUMNS, ROWS);
  for (let i = 0; i < words.length; i++) words[i] = PALETTE[shade(line[PREFIX + i], limits, log)];
  brush.putImageData(pixels, 0, 0);
}

/** Differences: blue below zero, red above, white at zero. */
function paintDifference({ brush, pixels, words }, line, most) {
  for (let i = 0; i < words.length; i++) words[i] = diverging(line[PREFIX + i] / (most || 1));
  brush.putImageData(pixels, 0, 0);
}

function diverging(share) {
  const away = Math.min(Math.abs(share), 1);
  const mix = (end) => Math.round(247 + (end - 247) * away);
  const [red, green, blue] = share < 0 ? [33, 102, 172] : [178, 24, 43];
  return word(mix(red), mix(green), mix(blue));
}

const littleEndian = new Uint8Array(Uint32Array.of(1).buffer)[0] === 1;

function word(red, green, blue) {
  return littleEndian
    ? ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0
    : ((red << 24) | (green << 16) | (blue << 8) | 255) >>> 0;
}

const PALETTE = Uint32Array.from({ length: 256 }, (_, i) => word(...VIRIDIS.subarray(3 * i, 3 * i + 3)));

