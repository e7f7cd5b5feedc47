"""Assemble one self-contained HTML file, which cannot fetch anything."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_UP, Context, Decimal
from html import escape
from importlib import resources
from typing import Any

import matplotlib
import numpy as np

from dinov2_attn.apps.explorer.budget import (
    KeptRows,
    cost,
    describe,
    describe_layer,
    everything,
    left_out,
)
from dinov2_attn.apps.explorer.coded import CodedLayer
from dinov2_attn.apps.explorer.content import Frame
from dinov2_attn.apps.explorer.quantise import Table
from dinov2_attn.errors import shown, shown_name

# The tables of a layer: at most one for "each" head and one for their "mean". A layer that is
# kept as queries and keys has "coded" in place of them.
Tables = Mapping[str, Table | CodedLayer]

SCRIPTS = (
    *("weights.js", "coded.js", "app.js", "colours.js"),
    *("compare.js", "models.js", "share.js", "input.js"),
)


@dataclass(frozen=True, eq=False)
class Held:
    """What a page holds of a model.

    Attributes:
        frame: The page without weights.
        kept: The rows of each layer that it keeps.
        tables: Their weights.
        whole: How many bytes each layer takes if all of it is kept. ``None``: as weights.

    """

    frame: Frame
    kept: Mapping[int, KeptRows]
    tables: Mapping[int, Tables]
    whole: Mapping[int, int] | None = None


_NUMBERS = """\
<p>An attention weight, softmax(q kᵀ), is what a query gives to a key. Patches are (row, column),
counted from 0 at the top left. Nothing is rescaled: a row, with CLS and registers, sums to one.</p>
<p>Maps and numbers are in units of <b>× uniform</b>: the weight times the number of tokens. 1 is
what each token gets if attention is spread evenly. The share beside it is the weight itself.</p>
<p>{how} The largest error of a weight on this page, measured against the weights of the model, is
<b id="worst">{error}</b>. The number after ± is the error bound of one weight. Numbers are shown
with four digits; the data elements of the page hold all digits.</p>
<p>{mean}</p>
<p>Colours begin at 0. With Log they begin at the smallest weight above 0, at most four decades
below the end. They end by the rules of the command line. <b>Robust</b> ends at the highest patch
of this map, or below the few highest patches: 0.5 % of them, in small maps 2 % but at most three.
It ends below them if the highest is more than twice the next patch, and if they hold at most two
thirds of the attention to patches. <b>Shared</b> ends at the highest patch of all heads of the
layer, <b>Each</b> at that of this map. overlay.png of heatmap has the same limits. In heads.png
one robust scale is for the mean and all heads together.</p>
{relevance}<p>Outliers {outliers} are artifact tokens, patches with an unusually large norm. Their
weights are not changed. If they are marked, Robust and Each leave them out of the limits.</p>
{read}<p>Kept: {kept}.{left_out}</p>"""

_CHOICE = (
    '<label title="Which tokens made the target, by all layers"><input type="radio" name="column" '
    'value="relevance"> Relevance</label>'
)
_KEY = "<tr><td><kbd>T</kbd></td><td>relevance for the target</td></tr>\n"
_RELEVANCE = (
    "<p>Relevance says which tokens made {target}, by the method {method}: {row}. It has no unit, "
    "and does not depend on the layer, head and token that are chosen. Robust and Each limits are "
    "as for attention; Shared is the same as Each. Methods disagree, and none of them is the "
    "truth.</p>\n"
)

_AS_WEIGHTS = (
    "Each weight is stored in 8 bits, in cubic steps from the minimum of its row to the maximum."
)
_AS_PRODUCTS = (
    "Queries and keys are stored as whole numbers, a few bits each, and this page computes every "
    "weight from them. Weights with the largest errors are corrected one by one."
)
_AS_BOTH = (
    "Layers that are kept whole are stored as queries and keys in whole numbers, a few bits each, "
    "and this page computes their weights. In other layers each weight is stored in 8 bits."
)

_COMPUTED = (
    "The mean of heads is computed on this page from these numbers. Its error is not larger."
)
_STORED = (
    "The mean of heads is stored if single heads are left out. Otherwise it is computed on this "
    "page from these numbers, and its error is not larger."
)


def assemble(
    frame: Frame,
    kept: Mapping[int, KeptRows],
    tables: Mapping[int, Tables],
    missing: str = "",
    other: Held | None = None,
) -> bytes:
    """Return the page, with the ``tables`` of every layer that keeps anything.

    ``missing`` says what the page leaves out, and ``other`` is a second model to compare.
    """
    script = "".join(map(_file, SCRIPTS))
    style = _file("app.css")
    height, width = frame.picture.shape[:2]
    parts = {
        "policy": _policy(style, script),
        "title": escape(shown_name(frame.title)),
        "about": _about(frame, other),
        "warning": _notes(frame, missing),
        "image": frame.image_url(),
        "width": str(width),
        "height": str(height),
        "rows": str(frame.shape.grid[0]),
        "columns": str(frame.shape.grid[1]),
        "relevance": "" if frame.explained is None else _CHOICE,
        "relevance_key": "" if frame.explained is None else _KEY,
        "numbers": _numbers(frame, kept, tables) + ("" if other is None else _numbers_of(other)),
        "data": embedded_json({**_data(frame, kept, tables), "other": _other(other)}),
        "tables": "\n".join([*_elements(tables), *_elements(other.tables if other else {}, "b-")]),
        "style": style,
        "script": script,
    }
    # In one pass, so that the title "{{data}}" is not replaced.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _file("page.html"))
    return page.encode()


def _about(frame: Frame, other: Held | None) -> str:
    """Return the line below the title: the models and their tokens."""
    frames = [frame] if other is None else [frame, other.frame]
    said = [" · ".join(filter(None, (one.model, one.token_counts))) for one in frames]
    if other is None:
        return escape(shown_name(said[0]))
    lines = (
        f"{letter}: {escape(shown_name(text))}" for letter, text in zip("AB", said, strict=True)
    )
    return "<br>".join(lines)


def _other(other: Held | None) -> dict[str, object] | None:
    if other is None:
        return None
    data = _data(other.frame, other.kept, other.tables)
    return {name: data[name] for name in ("prefix", "heads", "layers", "outliers")}


def _numbers_of(other: Held) -> str:
    """Return what is to be known of the numbers of the second model."""
    errors = [table.error for one in other.tables.values() for table in one.values()]
    return (
        f"\n<p>B: the largest error of a weight is {at_least(max(errors, default=0.0))}. "
        f"Outliers: {escape(other.frame.outliers_found)}. "
        f"Kept: {escape(describe(dict(other.kept), other.frame.shape))}.</p>"
    )


def _data(
    frame: Frame, kept: Mapping[int, KeptRows], tables: Mapping[int, Tables]
) -> dict[str, object]:
    layers = [_layer(frame, layer, kept[layer], tables[layer]) for layer in sorted(tables)]
    last = kept[max(tables)] if tables else KeptRows()
    colours = matplotlib.colormaps["viridis"](np.arange(256), bytes=True)[:, :3]
    return {
        "grid": frame.shape.grid,
        "prefix": frame.shape.prefix,
        "heads": frame.shape.heads,
        "token": min(last.queries, default=0),
        "layers": layers,
        "outliers": frame.outlier_tokens,
        "outliersFound": frame.outliers_found,
        "relevance": None if frame.explained is None else frame.explained.data(),
        "viridis": base64.b64encode(colours.tobytes()).decode(),
    }


def _layer(frame: Frame, layer: int, keep: KeptRows, tables: Tables) -> dict[str, object]:
    def table(kind: str) -> dict[str, Any] | None:
        found = tables.get(kind)
        if found is None:
            return None
        if isinstance(found, CodedLayer):
            return found.description()
        complete = found.queries == frame.shape.all_tokens
        return {"queries": None if complete else found.queries, "heads": len(found.codes)}

    return {
        "layer": layer,
        "coded": table("coded"),
        "each": table("each"),
        "mean": table("mean"),
        "kept": describe_layer(keep, frame.shape),
    }


def _elements(tables: Mapping[int, Tables], model: str = "") -> list[str]:
    return [
        f'<script type="application/octet-stream" id="{model}{kind}-{layer}">'
        f"{embedded(table)}</script>"
        for layer, by_kind in tables.items()
        for kind, table in by_kind.items()
    ]


def _notes(frame: Frame, missing: str) -> str:
    notes = []
    if frame.warning is not None:
        notes.append(f'<p class="warning" id="warning">{escape(shown(frame.warning))}</p>')
    if missing:
        notes.append(f'<p id="left-out">{escape(missing)}</p>')
    return "\n".join(notes)


def what_is_missing(
    frame: Frame,
    kept: Mapping[int, KeptRows],
    lacking: str,
    whole: Mapping[int, int] | None = None,
    models: int = 1,
) -> str:
    """Return what the page leaves out, why, and what would keep it.

    ``whole`` says how many bytes each layer takes if all of it is kept, by default as weights.
    Of several ``models`` each has the same share of the page.
    """
    complete = everything(frame.shape)
    as_weights = dict.fromkeys(kept, cost(complete, frame.shape))
    all_of_it = frame.limit + sum(
        (whole or as_weights)[layer] - cost(keep, frame.shape)
        for layer, keep in kept.items()
        if keep != complete
    )
    return (
        f"Left out to stay below {models * frame.limit / 1e6:g} MB: {lacking}. "
        f"--max-mb {models * -(-all_of_it // 1_000_000)} keeps everything. "
        "Fewer --layers need less."
    )


def _numbers(frame: Frame, kept: Mapping[int, KeptRows], tables: Mapping[int, Tables]) -> str:
    errors = [table.error for one in tables.values() for table in one.values()]
    lacking = left_out(dict(kept), frame.shape)
    coded = ["coded" in one for one in tables.values()]
    stored = any("mean" in one for one in tables.values())
    return _NUMBERS.format(
        how=_AS_BOTH if len(set(coded)) == 2 else _AS_PRODUCTS if any(coded) else _AS_WEIGHTS,
        error=at_least(max(errors, default=0.0)),
        mean=_STORED if stored else _COMPUTED,
        outliers=escape(frame.outliers_found),
        relevance=_explained(frame),
        read=f"<p>{escape(frame.range_note)}</p>\n" if frame.range_note else "",
        kept=escape(describe(dict(kept), frame.shape)),
        left_out=escape(f" Left out: {lacking}.") if lacking else "",
    )


def _explained(frame: Frame) -> str:
    one = frame.explained
    if one is None:
        return ""
    return _RELEVANCE.format(target=escape(one.target), method=one.method, row=escape(one.row))


def at_least(value: float) -> str:
    """Return ``value`` rounded up to two digits."""
    rounded = Context(prec=2, rounding=ROUND_UP).create_decimal_from_float(value)
    return (
        f"{rounded.normalize():f}"
        if rounded >= Decimal("1e-6") or not rounded
        else f"{rounded:.1e}"
    )


def _policy(style: str, script: str) -> str:
    """Return a policy that allows this style, this script and embedded images only.

    Nothing can be fetched. Code smuggled in through a file name could not run.
    """
    return (
        f"default-src 'none'; img-src data:; style-src {_digest(style)}; "
        f"script-src {_digest(script)}; base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def embedded(table: Table | CodedLayer) -> str:
    """Return the bytes of a table in base64."""
    return base64.b64encode(table.content()).decode()


def embedded_json(data: object) -> str:
    """Return JSON without ``<``, so that no tag can end the element around it."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
