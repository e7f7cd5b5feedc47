// The weights of the page: codes of 8 bits, between the minimum and maximum of each row.

const MEAN = -1; // in place of a head

const LEVELS = Float64Array.from({ length: 256 }, (_, code) => {
  const step = code / 255;
  return step * step * step;
});

function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  return bytes;
}

/** Rows of some tokens, of one head or several. Decoded at first use. */
class Table {
  constructor(element, { queries, heads }, tokens) {
    this.heads = heads;
    this.tokens = tokens;
    this.complete = queries === null;
    this.rows = this.complete ? tokens : queries.length;
    this.places = this.complete ? null : new Map(queries.map((query, row) => [query, row]));
    this.element = element;
  }

  has(query) {
    return this.complete || this.places.has(query);
  }

  row(head, query) {
    if (!this.codes) this.read();
    return head * this.rows + (this.complete ? query : this.places.get(query));
  }

  weight(head, query, key) {
    const row = this.row(head, query);
    const least = this.least[row];
    return least + (this.most[row] - least) * LEVELS[this.codes[row * this.tokens + key]];
  }

  /** The row of `token`, or its column. */
  line(head, token, column) {
    const line = new Float64Array(this.tokens);
    for (let other = 0; other < line.length; other++) {
      line[other] = column ? this.weight(head, other, token) : this.weight(head, token, other);
    }
    return line;
  }

  /** The error bound: half a step to the next level, and the rounding of the row. */
  doubt(head, query, key) {
    const row = this.row(head, query);
    const code = this.codes[row * this.tokens + key];
    const gap = LEVELS[Math.min(code + 1, 255)] - LEVELS[Math.min(code, 254)];
    return ((this.most[row] - this.least[row]) * gap) / 2 + 2 ** -23 * this.most[row];
  }

  read() {
    const { buffer } = fromBase64(this.element.textContent);
    const count = this.heads * this.rows;
    this.least = new Float32Array(buffer, 0, count);
    this.most = new Float32Array(buffer, 4 * count, count);
    this.codes = new Uint8Array(buffer, 8 * count);
    this.element.textContent = ""; // free the text, which is larger than the bytes
  }
}

class Layer {
  constructor({ layer, coded, each, mean, kept }, tokens, page, model = "") {
    const element = (kind) => page.getElementById(`${model}${kind}-${layer}`);
    this.number = layer;
    this.kept = kept;
    this.ready = !coded;
    this.each = each && new Table(element("each"), each, tokens);
    if (coded) this.each = new Coded(element("coded"), coded, tokens);
    this.mean = mean && new Table(element("mean"), mean, tokens);
    this.cache = { name: "", lines: [] };
  }

  /** Read the numbers, if that takes time. Nothing else may be asked before. */
  async load() {
    this.loading ??= this.each.read();
    await this.loading;
    this.ready = true;
  }

  /** Whether the row or column of `token` is there, in a head or the mean of heads. */
  has(head, token, column) {
    const there = (table) => Boolean(table) && (column ? table.complete : table.has(token));
    return there(this.each) || (head === MEAN && there(this.mean));
  }

  /** The row of `token` in a head or their mean, or its column; null if it is not there. */
  line(head, token, column) {
    if (!this.has(head, token, column)) return null;
    const lines = this.lines(token, column);
    if (head !== MEAN) return lines[head] ?? null;
    return lines.length ? meanOf(lines) : this.mean.line(0, token, column);
  }

  /** The lines of all heads, as far as they are kept. The last ones are remembered. */
  lines(token, column) {
    const name = `${token} ${column}`;
    if (this.cache.name !== name) {
      const heads = this.has(0, token, column) ? [...Array(this.each.heads).keys()] : [];
      this.cache = { name, lines: heads.map((head) => this.each.line(head, token, column)) };
    }
    return this.cache.lines;
  }

  /** The error bound of a weight in a head or their mean. */
  doubt(head, query, key, column) {
    const lines = this.lines(column ? key : query, column);
    if (!lines.length) return this.mean.doubt(0, query, key);
    const bound = (one) => this.each.doubt(one, query, key, lines[one][column ? query : key]);
    if (head !== MEAN) return bound(head);
    return lines.reduce((sum, _, one) => sum + bound(one), 0) / lines.length;
  }
}

function meanOf(lines) {
  const mean = new Float64Array(lines[0].length);
  for (const line of lines) for (let i = 0; i < mean.length; i++) mean[i] += line[i];
  for (let i = 0; i < mean.length; i++) mean[i] /= lines.length;
  return mean;
}

