"""An exported file against PyTorch: the same images through onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2_attn.errors import InvalidInputError, UnfaithfulError

# The largest difference that is allowed, as a share of the largest number of an output. Roundings
# add up over the layers. Another formula is off by more.
TOLERANCES = {torch.float32: 3e-4, torch.float16: 3e-2}

Outputs = Mapping[str, Tensor]


def differences(
    file: Path, name: str, batches: Sequence[Tensor], expected: Sequence[Outputs]
) -> dict[str, tuple[float, float]]:
    """Return how far onnxruntime is from PyTorch.

    Args:
        file: The ONNX file.
        name: The name of its input.
        batches: Images ``(B, C, H, W)``.
        expected: What PyTorch returns for each, by the names of the outputs.

    Returns:
        For each output the largest difference, and the same as a share of its largest number.

    Raises:
        InvalidInputError: If onnxruntime cannot run the file.

    """
    import numpy as np

    found = dict.fromkeys(expected[0], (0.0, 0.0))
    session = _session(file)
    for images, outputs in zip(batches, expected, strict=True):
        answers = _run(session, list(outputs), {name: images.cpu().numpy()})
        for (key, right), answer in zip(outputs.items(), answers, strict=True):
            found[key] = max(found[key], _difference(np.asarray(answer), right))
    return found


def require_agreement(
    found: Mapping[str, tuple[float, float]], tolerance: float, images: str
) -> None:
    """Raise ``UnfaithfulError`` if an output differs by more than ``tolerance``."""
    wrong = {key: share for key, (_, share) in found.items() if not share <= tolerance}
    if wrong:
        key = max(wrong, key=lambda one: wrong[one])
        raise UnfaithfulError(
            f"outputs of onnxruntime within {tolerance:.0e} of PyTorch's, {images}",
            f"{key}, which differs by {found[key][0]:.1e}, a share of {wrong[key]:.1e} of its "
            "largest number",
            "No file was written. Try another --opset (in Python opset=), or export in float32: "
            "model.float().",
        )


def _session(file: Path) -> object:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: its warnings are about its own optimisations
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it has many kinds, all of them its own
        raise _not_run(error) from error


def _run(session: object, names: list[str], given: dict[str, object]) -> list[object]:
    try:
        answers: list[object] = session.run(names, given)  # type: ignore[attr-defined]
    except Exception as error:
        raise _not_run(error) from error
    return answers


def _not_run(error: Exception) -> InvalidInputError:
    return InvalidInputError(
        "a file that onnxruntime runs on a CPU",
        f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
        "Install a newer onnxruntime, or write a file that it cannot check: check=False, on the "
        "command line --no-check.",
    )


def _difference(answer: Any, right: Tensor) -> tuple[float, float]:
    """Return the largest difference, and its share of the largest number."""
    import numpy as np

    wide = right.detach().cpu().double().numpy()
    if answer.shape != wide.shape:
        return float("inf"), float("inf")
    # Where both are NaN or the same infinity they agree.
    same = (answer == wide) | (np.isnan(answer) & np.isnan(wide))
    gaps = np.where(same, 0, np.abs(answer - wide))
    # NaN on one side only is no agreement, and the larger of two pairs would not show it.
    gap = float(np.max(np.where(np.isnan(gaps), np.inf, gaps), initial=0))
    largest = float(np.max(np.abs(wide), initial=0, where=np.isfinite(wide)))
    return gap, gap / largest if largest else gap
