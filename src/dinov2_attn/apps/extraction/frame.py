"""``frame``: the index of an extraction as a table of pandas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dinov2_attn.errors import UnavailableError

if TYPE_CHECKING:
    import pandas

# The numbers of the index that have one entry for each layer.
EACH_LAYER = ("prefix_mass", "entropy")


def frame_of(entries: Iterable[dict[str, Any]], layers: Sequence[int]) -> pandas.DataFrame:
    """Return a table with a row for each of ``entries``, the lines of an index.

    Raises:
        UnavailableError: If pandas is missing.

    """
    try:
        import pandas
    except ImportError as error:
        raise UnavailableError(
            "the library pandas", str(error), "Install it with `pip install 'dinov2-attn[pandas]'`."
        ) from error
    table = pandas.DataFrame(
        [row_of(entry, layers) for entry in entries], columns=columns_of(layers)
    )
    # An image may have no report, and a number that is missing would make all of them floats.
    return table.astype({"artifacts": "Int64", "frame": "Int64", "time": "float64"})


def artifacts_in(entry: dict[str, Any]) -> int | None:
    """Return the number of artifact tokens of an image, ``None`` if they were not looked for."""
    return None if entry["artifacts"] is None else len(entry["artifacts"]["tokens"])


def columns_of(layers: Sequence[int]) -> list[str]:
    """Return the names of the columns."""
    numbers = [f"{name}_{layer}" for name in EACH_LAYER for layer in layers]
    sides = ["height", "width", "rows", "columns"]
    digests = ["shard", "sha256", "checksum"]
    return ["number", "source", "path", *sides, *numbers, "artifacts", *digests, "frame", "time"]


def row_of(entry: dict[str, Any], layers: Sequence[int]) -> list[Any]:
    """Return the row of an image, in the order of the columns."""
    numbers = [number for name in EACH_LAYER for number in _floats(entry[name])[: len(layers)]]
    return [
        entry["number"],
        *(_as_text(entry[key]) for key in ("source", "path")),
        *entry["size"],
        *entry["grid"],
        *numbers,
        artifacts_in(entry),
        *(entry[key] for key in ("shard", "sha256", "checksum")),
        *(entry.get(key) for key in ("frame", "time")),
    ]


def _as_text(name: str) -> str:
    r"""Return a name as tables can hold it: a byte that is not UTF-8 becomes ``\udcff``."""
    return name.encode("utf-8", "backslashreplace").decode()


def _floats(numbers: Sequence[float | None]) -> list[float]:
    """Return ``numbers`` with NaN where the index has none."""
    return [float("nan") if number is None else number for number in numbers]
