"""A report on the artifact tokens of one image as a line of text."""

from __future__ import annotations

import math
from typing import Any

# Tokens named in a line of text.
NAMED = 6


def in_words(entry: dict[str, Any]) -> str:
    """Return ``entry``, a report on one image, as one line."""
    patches, tokens = math.prod(entry["grid"]), entry["tokens"]
    where = f"after block {entry['layer']}"
    if not tokens:
        return f"no artifact tokens among {patches} patches (norms {where})"
    named = ", ".join(
        f"({token['row']}, {token['col']}) {_short(token['norm'])}" for token in tokens[:NAMED]
    )
    more = f" and {len(tokens) - NAMED} more" if len(tokens) > NAMED else ""
    doubt = "; so many are no artifacts" if entry["suspicious"] else ""
    return (
        f"{len(tokens)} of {patches} patches with a norm above {_short(entry['threshold'])} "
        f"{where}: {named}{more}; they hold {_percent(entry['share'])} of CLS's attention in the "
        f"last block{doubt}"
    )


def _short(number: float | None) -> str:
    return "?" if number is None else f"{number:.4g}"


def _percent(number: float | None) -> str:
    return "?" if number is None else f"{100 * number:.1f} %"
