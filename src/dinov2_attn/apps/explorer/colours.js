// Colours: limits of a map, and what is painted.

/** The minimum and maximum of the patches; for logarithms the minimum above zero. */
function extremesOf(lines, log) {
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

/** The 99.5th percentile of the patches, interpolated as numpy.percentile does. */
function nearlyHighest(lines) {
  const count = lines.length * (TOKENS - PREFIX);
  const place = 0.995 * (count - 1);
  const top = new Float64Array(count - Math.floor(place)).fill(-Infinity);
  for (const line of lines) collectHighest(line, PREFIX, top);
  const next = Math.min(1, top.length - 1);
  return top[0] + (place - Math.floor(place)) * (top[next] - top[0]);
}

/** Put the highest numbers of `line` into `top`, which is ascending. */
function collectHighest(line, start, top) {
  for (let i = start; i < line.length; i++) {
    if (line[i] <= top[0]) continue;
    let at = 0;
    for (; at + 1 < top.length && top[at + 1] < line[i]; at++) top[at] = top[at + 1];
    top[at] = line[i];
  }
}

function highest(line, count) {
  const top = new Float64Array(count).fill(-Infinity);
  collectHighest(line, 0, top);
  return top;
}

/** Where the colours of a map begin and end. */
function limitsOf(lines, kind, log) {
  const [low, high] = extremesOf(lines, log);
  if (kind === "map") return [low, high];
  const end = nearlyHighest(lines);
  return [log ? Math.min(low, end) : 0, end];
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

