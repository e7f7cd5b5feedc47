// A layer that is stored as queries and keys: its weights are computed here.

const LOG_STEP = 2 ** -13; // of the logarithms of the sums of rows

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Response(stream).arrayBuffer();
}

/** Gaps in LEB128, added up: ascending places. Returns them and where the next list begins. */
function readPlaces(bytes, start, count) {
  const places = new Uint32Array(count);
  let place = 0;
  for (let i = 0; i < count; i++) {
    let shift = 0;
    let byte;
    do {
      byte = bytes[start++];
      place += (byte & 127) << shift;
      shift += 7;
    } while (byte > 127);
    places[i] = place;
  }
  return [places, start];
}

class Coded {
  constructor(element, about, tokens) {
    Object.assign(this, about); // heads, rank, unit, corrections, error, relative
    this.tokens = tokens;
    this.element = element;
    this.complete = true;
  }

  has() {
    return true;
  }

  /** Read all numbers. Nothing else may be asked before. */
  async read() {
    const bytes = fromBase64(this.element.textContent);
    this.element.textContent = ""; // free the text, which is larger than the bytes
    const buffer = await inflate(bytes);
    const { heads, rank, tokens } = this;
    const factor = new Float32Array(buffer, 0, heads * rank);
    const sums = new Int32Array(buffer, 4 * heads * rank, heads * tokens);
    this.sums = Float64Array.from(sums, (sum) => sum * LOG_STEP);
    const planes = 2 * heads * rank;
    const start = 4 * heads * (rank + tokens);
    const order = new Uint16Array(buffer, start, planes);
    const lower = new Uint8Array(buffer, start + 2 * planes, planes * tokens);
    const upper = start + 2 * planes + planes * tokens;
    const end = this.unpack(order, lower, new Int8Array(buffer, upper), factor);
    this.readCorrections(new Uint8Array(buffer), upper + end);
  }

  /** Numbers of queries and keys, token by token. Factors go to the queries. */
  unpack(order, lower, upper, factor) {
    const { heads, rank, tokens } = this;
    // One number more than there are, since products are added two at a time.
    this.sides = [0, 1].map(() => new Float32Array(heads * tokens * rank + 1));
    this.used = Array(heads).fill(0); // the components that are not zero; the largest come first
    let next = 0; // in the upper bytes
    for (let i = 0; i < order.length; i++) {
      const plane = order[i] & 0x7fff;
      const wide = order[i] > 0x7fff;
      const component = plane % rank;
      const isKey = Math.floor(plane / rank) % 2;
      const head = Math.floor(plane / rank / 2);
      const scale = isKey ? 1 : factor[head * rank + component];
      const side = this.sides[isKey];
      let place = head * tokens * rank + component;
      if (scale !== 0) this.used[head] = Math.max(this.used[head], component + 1);
      for (let token = 0; token < tokens; token++, place += rank) {
        const low = (lower[i * tokens + token] << 24) >> 24;
        side[place] = scale * (wide ? low + 256 * upper[next++] : low);
      }
    }
    return next;
  }

  readCorrections(bytes, start) {
    this.places = this.corrections.map((count) => {
      const [places, end] = readPlaces(bytes, start, count);
      start = end;
      return places;
    });
    this.steps = this.corrections.map((count) => {
      const steps = new Int8Array(bytes.buffer, start, count);
      start += count;
      return steps;
    });
  }

  /** The row of `token`, or its column. */
  line(head, token, column) {
    const { rank, tokens } = this;
    const line = new Float64Array(tokens);
    const [own, others] = column ? [this.sides[1], this.sides[0]] : this.sides;
    const from = head * tokens * rank;
    const vector = own.slice(from + token * rank, from + (token + 1) * rank + 1);
    vector[rank] = 0;
    const sums = this.sums;
    const used = this.used[head];
    for (let other = 0, place = from; other < tokens; other++, place += rank) {
      let [even, odd] = [0, 0]; // two sums at a time take half as long as one
      for (let i = 0; i < used; i += 2) {
        even += vector[i] * others[place + i];
        odd += vector[i + 1] * others[place + i + 1];
      }
      line[other] = Math.exp(even + odd - sums[head * tokens + (column ? other : token)]);
    }
    this.correct(line, head, token, column);
    return line;
  }

  correct(line, head, token, column) {
    const [places, steps, unit] = [this.places[head], this.steps[head], this.unit[head]];
    if (column) {
      for (let i = 0; i < places.length; i++) {
        if (places[i] % this.tokens === token) line[Math.floor(places[i] / this.tokens)] += steps[i] * unit;
      }
      return;
    }
    const first = token * this.tokens;
    for (let i = firstAtLeast(places, first); places[i] < first + this.tokens; i++) {
      line[places[i] - first] += steps[i] * unit;
    }
  }

  /** The error bound of one weight. */
  doubt(head, query, key, weight) {
    return Math.min(this.error[head], this.relative[head] * weight + 1e-9);
  }
}

function firstAtLeast(sorted, value) {
  let [low, high] = [0, sorted.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

