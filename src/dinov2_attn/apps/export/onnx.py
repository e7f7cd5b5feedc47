"""``export_onnx``: a model with its attention as an ONNX file, checked in onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from dinov2_attn._files import atomic_folder
from dinov2_attn.apps.export.asked import read_asked
from dinov2_attn.apps.export.check import TOLERANCES, differences, require_agreement
from dinov2_attn.apps.export.libraries import require_libraries
from dinov2_attn.apps.export.subject import Subject, subject_of
from dinov2_attn.apps.export.traced import exported, require_exporter
from dinov2_attn.backbone.undisturbed import undisturbed
from dinov2_attn.errors import InvalidInputError, UnwritableOutputError
from dinov2_attn.math.attention import check_heads
from dinov2_attn.typing import Grid, Heads, Layer

INPUT = "images"
# The key of the file's metadata.
METADATA = "dinov2_attn"
# The batch that is traced, and those of the check. A size of 1 would become fixed.
TRACED, CHECKED = 2, (1, 3)
# A file of protobuf ends at 2 GB. Larger weights are in a second file.
MOST_IN_ONE_FILE = 1_800_000_000


@dataclass(frozen=True)
class OnnxExport:
    """What ``export_onnx`` wrote.

    Attributes:
        path: The file. Weights of more than 1.8 GB are in ``model.onnx.data`` next to it.
        image_size: Height and width that the graph takes, in pixels.
        outputs: The shape of each output for one image, by name, without the batch.
        layers: What the model calls the layer of each output of attention, by name.
        differences: The largest difference to PyTorch of each output, by name. Empty without a
            check.
        bytes: The bytes that were written.

    """

    path: Path
    image_size: Grid
    outputs: Mapping[str, tuple[int, ...]] = field(hash=False)
    layers: Mapping[str, Layer] = field(hash=False)
    differences: Mapping[str, float] = field(hash=False)
    bytes: int

    def __str__(self) -> str:
        shapes = [
            f"{name} ({', '.join(map(str, ('batch', *shape)))})"
            for name, shape in self.outputs.items()
        ]
        height, width = self.image_size
        return f"{INPUT} (batch, channels, {height}, {width}) → {', '.join(shapes)}"


def export_onnx(
    model: nn.Module,
    path: str | Path,
    attentions: str = "last:cls",
    *,
    heads: Heads = None,
    image_size: int | Sequence[int] | None = None,
    opset: int | None = None,
    check: bool = True,
    name: str | None = None,
) -> OnnxExport:
    """Write ``model`` as an ONNX file whose outputs are its own and its attention.

    >>> dinov2_attn.export_onnx(model, "model.onnx", "last:cls").outputs
    {'features': (384,), 'attention_11': (6, 1, 1370)}

    The graph comes from PyTorch's dynamo exporter. It takes batches of any size, and images of one
    size. Attention is softmax(q kᵀ · scale) of what each kernel is given, as in ``record``. The
    model is left as it was, and no random number is drawn. The file appears after the check.

    Outputs are ``features`` (of a model that returns a dict its keys, of a tuple ``features_0``
    and so on) and ``attention_11`` for layer 11, ``(B, heads, Q, N)``. Where layers are paths, the
    number is a place in their order. The metadata ``dinov2_attn`` of the file has layers, tokens
    and grid as JSON.

    Args:
        model: A model in eval mode, in float32 or float16: a DINOv2, or any other with
            attention inside that ``torch.export`` can trace.
        path: The file, which ends in ``.onnx``.
        attentions: ``LAYERS`` or ``LAYERS:TOKENS``. Layers are ``last``, ``all``, or numbers with
            commas, negative ones from the end. Tokens are ``cls``, ``registers``, ``patches``, or
            one as ``register:2`` or ``3,17``. Without tokens all rows are returned.
        heads: None for each head, ``"mean"`` for their mean.
        image_size: The side of square images in pixels, or ``(height, width)``, in whole patches.
            By default the model's own size.
        opset: The version of ONNX's operators. By default the exporter's.
        check: Whether to compare all outputs with PyTorch's in onnxruntime, for batches of 1 and 3
            on the CPU.
        name: What the metadata call the model.

    Returns:
        An ``OnnxExport``.

    Raises:
        InvalidInputError: If an argument is wrong, or the model cannot be exported.
        OutOfRangeError: If there is no such layer or token.
        UnfaithfulError: If onnxruntime returns something else than PyTorch. No file is left.
        UnavailableError: If a library is missing, or PyTorch is too old.
        UnwritableOutputError: If the file cannot be written.

    """
    require_libraries(check)
    require_exporter()
    path, asked = _checked_path(Path(path)), read_asked(attentions)
    check_heads(heads)
    subject = subject_of(model, asked, heads, image_size)
    with undisturbed(model, subject.device):
        program = exported(subject, subject.images(TRACED), INPUT, opset)
        program.model.metadata_props[METADATA] = json.dumps(subject.facts(name))
        found, written = _written(program, path, subject, check)
    return OnnxExport(
        path=path,
        image_size=subject.size,
        outputs=subject.shapes,
        layers=subject.layers,
        differences=found,
        bytes=written,
    )


def _written(
    program: Any, path: Path, subject: Subject, check: bool
) -> tuple[dict[str, float], int]:
    """Write the file and move it to ``path`` when it was checked; return what the check found."""
    found: dict[str, tuple[float, float]] = {}
    with atomic_folder(path.parent, without=[f"{path.name}.data"]) as unfinished:
        file = unfinished / path.name
        program.save(file, external_data=subject.bytes > MOST_IN_ONE_FILE)
        if check:
            batches = list(map(subject.images, CHECKED))
            found = differences(file, INPUT, batches, list(map(subject.outputs, batches)))
            require_agreement(found, TOLERANCES[subject.dtype], subject.described)
        written = sum(one.stat().st_size for one in unfinished.iterdir())
    return {key: gap for key, (gap, _) in found.items()}, written


def _checked_path(path: Path) -> Path:
    if path.suffix.lower() != ".onnx":
        raise InvalidInputError("a name that ends in .onnx", path.name, "Try model.onnx.")
    with suppress(OSError):
        if path.is_dir():
            raise UnwritableOutputError(
                f"a file that can be written at {path}", "a folder", "Name another file."
            )
    return path
