"""Which attention an exported model returns: the text of ``--attentions``, such as ``last:cls``."""

from __future__ import annotations

from dataclasses import dataclass

from dinov2_attn.apps.viz.tokens import read_query
from dinov2_attn.errors import InvalidInputError

GRAMMAR = "LAYERS or LAYERS:TOKENS, such as last:cls, all, 5,11:patches or -1:registers"


@dataclass(frozen=True)
class Asked:
    """The layers and the tokens of an export.

    Attributes:
        layers: As for ``attention_maps``: None for all, 1 for the last, or numbers.
        query: The tokens in the grammar of the command line: ``cls``, ``registers``, ``patches``,
            ``all``, ``register:2``, a patch ``3,17``, or a position ``#17``.

    """

    layers: int | list[int] | None
    query: str


def read_asked(text: object) -> Asked:
    """Return what ``text`` asks for.

    Args:
        text: ``last``, ``all`` or numbers of layers with commas between them. After a colon the
            tokens whose rows are wanted. Without them the whole matrix is.

    Raises:
        InvalidInputError: If ``text`` is not of this form.

    """
    layers, colon, query = text.partition(":") if isinstance(text, str) else ("", "", "")
    found = _layers(layers)
    if found == [] or (colon and not query):
        raise InvalidInputError(
            f"attentions as {GRAMMAR}",
            repr(text),
            "Name layers first: last, all, or numbers from 0 on. Try last:cls.",
        )
    if query:
        read_query(query)  # raises if it stands for no tokens
    return Asked(found, query or "all")


def _layers(text: str) -> int | list[int] | None:
    if text in ("last", "all"):
        return 1 if text == "last" else None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        return []
