"""Reading a written page in Python, without any of the code that wrote it."""

from __future__ import annotations

import base64
import json
import zlib
from html.parser import HTMLParser

import numpy as np


class Page(HTMLParser):
    """The elements of a page, and the weights that its tables hold."""

    def __init__(self, path):
        super().__init__()
        self.elements = []
        self.size = path.stat().st_size
        self._open = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        self.about = json.loads(self.one("script", id="about")["text"])

    def handle_starttag(self, tag, attrs):
        self.elements.append({"tag": tag, "text": "", **dict(attrs)})
        self._open.append(self.elements[-1])

    def handle_endtag(self, tag):
        while self._open and self._open.pop()["tag"] != tag:
            pass

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, tag, **attributes):
        return [e for e in self.elements if e["tag"] == tag and attributes.items() <= e.items()]

    def one(self, tag, **attributes):
        (element,) = self.all(tag, **attributes)
        return element

    @property
    def tokens(self):
        height, width = self.about["grid"]
        return self.about["prefix"] + height * width

    @property
    def error(self):
        """The error that the page states."""
        return float(self.one("b", id="worst")["text"])

    def layer(self, number):
        """Return what is kept of a layer: ``{"each": {(head, query): row}, "mean": …}``."""
        (layer,) = [one for one in self.about["layers"] if one["layer"] == number]
        if layer["coded"]:
            content = base64.b64decode(self.one("script", id=f"coded-{number}")["text"])
            each = decoded(content, layer["coded"], self.tokens)
            return {
                "each": {(h, q): row for h, rows in enumerate(each) for q, row in enumerate(rows)}
            }
        kinds = [kind for kind in ("each", "mean") if layer[kind]]
        return {kind: self._rows(f"{kind}-{number}", layer[kind]) for kind in kinds}

    def _rows(self, identity, table):
        content = base64.b64decode(self.one("script", id=identity)["text"], validate=True)
        queries = table["queries"] if table["queries"] is not None else range(self.tokens)
        count = table["heads"] * len(queries)
        low, high = np.frombuffer(content, "<f4", 2 * count).astype(float).reshape(2, count, 1)
        codes = np.frombuffer(content, np.uint8, offset=8 * count).reshape(count, self.tokens)
        rows = low + (high - low) * (codes / 255.0) ** 3
        places = [(head, query) for head in range(table["heads"]) for query in queries]
        return dict(zip(places, rows, strict=True))


def decoded(content, about, tokens):
    """Return the weights ``(heads, N, N)`` of a layer that is stored as queries and keys."""
    rest = zlib.decompress(content, -15)

    def take(dtype, *shape):
        nonlocal rest
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        taken, rest = rest[:size], rest[size:]
        return np.frombuffer(taken, dtype).reshape(shape)

    heads, rank = about["heads"], about["rank"]
    factor, log_sums = take("<f4", heads, rank), take("<i4", heads, tokens)
    order = take("<u2", 2 * heads * rank)
    planes = take("i1", len(order), tokens).astype(int)
    wide = order >= 0x8000
    planes[wide] += 256 * take("i1", wide.sum(), tokens).astype(int)
    sides = np.empty_like(planes)
    sides[order & 0x7FFF] = planes
    query, key = sides.reshape(heads, 2, rank, tokens).swapaxes(0, 1)
    products = np.einsum("hri,hr,hrj->hij", query, factor.astype(float), key)
    weights = np.exp(products - log_sums[:, :, None] / 8192)
    gaps = list(rest)
    places = [np.cumsum([_varint(gaps) for _ in range(n)], dtype=int) for n in about["corrections"]]
    steps = np.array(gaps, np.uint8).view("i1")
    for head, (where, unit) in enumerate(zip(places, about["unit"], strict=True)):
        weights[head].reshape(-1)[where] += steps[: len(where)] * unit
        steps = steps[len(where) :]
    assert not len(steps)
    return weights


def _varint(numbers):
    """Take one number in LEB128 from the front of a list of bytes."""
    value = shift = 0
    while True:
        byte = numbers.pop(0)
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value
