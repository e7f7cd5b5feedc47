"""The index of an extraction as a Parquet file: the columns of ``frame``, streamed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from dinov2_attn._files import atomic_file
from dinov2_attn._imports import is_installed
from dinov2_attn.apps.extraction.described import METADATA
from dinov2_attn.apps.extraction.frame import EACH_LAYER, columns_of, row_of
from dinov2_attn.apps.extraction.layout import INDEX
from dinov2_attn.errors import InvalidInputError, UnavailableError, shown_name

log = logging.getLogger(__name__)

PARQUET = "index.parquet"
# The rows that are in memory at a time, and in a row group.
ROWS = 10_000

_TEXTS = {"source", "path", "shard", "sha256", "checksum"}


def check_index(index: object) -> bool:
    """Return whether ``index`` asks for Parquet; raise if it is wrong or pyarrow is missing."""
    if index not in ("jsonl", "parquet"):
        raise InvalidInputError(
            "index as 'jsonl' or 'parquet'", repr(index), "Leave it out for index.jsonl alone."
        )
    if index == "parquet" and not is_installed("pyarrow"):
        raise UnavailableError(
            "the library pyarrow",
            "none in this environment",
            "Install it with `pip install 'dinov2-attn[parquet]'`.",
        )
    return index == "parquet"


def write_parquet(folder: Path, about: dict[str, Any], *, asked: bool) -> None:
    """Write ``index.parquet`` from ``index.jsonl``, if it is asked for or there is an older one."""
    path = folder / PARQUET
    if not asked and not path.exists():
        return
    if not is_installed("pyarrow"):  # of another run, and no longer true
        name = shown_name(path)
        log.warning("%s was removed: pyarrow, which would write it again, is missing", name)
        path.unlink()
        return
    import pyarrow
    from pyarrow import parquet

    layers = about["tensors"]["layers"]
    schema = _schema(layers, about)
    with atomic_file(path) as unfinished, parquet.ParquetWriter(unfinished, schema) as writer:
        for rows in _batches(folder, layers):
            columns = [
                pyarrow.array(list(values), field.type, from_pandas=True)
                for values, field in zip(zip(*rows, strict=True), schema, strict=True)
            ]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))


def _batches(folder: Path, layers: Sequence[int]) -> Iterator[list[list[Any]]]:
    with (folder / INDEX).open(encoding="utf-8") as lines:
        while rows := [row_of(json.loads(line), layers) for line in islice(lines, ROWS)]:
            yield rows


def _schema(layers: Sequence[int], about: dict[str, Any]) -> Any:
    import pyarrow

    def kind(name: str) -> Any:
        if name in _TEXTS:
            return pyarrow.string()
        return pyarrow.float64() if name.startswith((*EACH_LAYER, "time")) else pyarrow.int64()

    fields = [pyarrow.field(name, kind(name)) for name in columns_of(layers)]
    described = {key: about[key] for key in ("format", "tensors", "preprocessing")}
    return pyarrow.schema(fields, metadata={METADATA: json.dumps(described)})
