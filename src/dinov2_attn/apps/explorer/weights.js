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
  constructor(id, { queries, heads }, tokens) {
    this.heads = heads;
    this.tokens = tokens;
    this.complete = queries === null;
    this.rows = this.complete ? tokens : queries.length;
    this.places = this.complete ? null : new Map(queries.map((query, row) => [query, row]));
    this.element = document.getElementById(id);
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
  constructor({ layer, each, mean, kept }, tokens) {
    this.number = layer;
    this.kept = kept;
    this.tokens = tokens;
    this.each = each && new Table(`each-${layer}`, each, tokens);
    this.mean = mean && new Table(`mean-${layer}`, mean, tokens);
  }

  /** The row of `token` in a head or their mean, or its column. */
  line(head, token, column) {
    const [table, heads] = this.source(head);
    if (!table || !(column ? table.complete : table.has(token))) return null;
    const line = new Float64Array(this.tokens);
    for (const one of heads) {
      for (let other = 0; other < line.length; other++) {
        line[other] += column ? table.weight(one, other, token) : table.weight(one, token, other);
      }
    }
    if (heads.length > 1) for (let i = 0; i < line.length; i++) line[i] /= heads.length;
    return line;
  }

  /** The error bound of a weight in a head or their mean. */
  doubt(head, query, key) {
    const [table, heads] = this.source(head);
    const doubts = heads.map((one) => table.doubt(one, query, key));
    return doubts.reduce((sum, doubt) => sum + doubt, 0) / doubts.length;
  }

  /** The lines of all heads if they are kept, or else that of the mean. */
  lines(token, column) {
    const heads = this.each ? [...Array(this.each.heads).keys()] : [];
    const lines = heads.map((head) => this.line(head, token, column)).filter((line) => line);
    return lines.length ? lines : [this.line(MEAN, token, column)];
  }

  source(head) {
    if (head !== MEAN) return [this.each, [head]];
    if (this.mean) return [this.mean, [0]];
    return [this.each, this.each ? [...Array(this.each.heads).keys()] : []];
  }
}
