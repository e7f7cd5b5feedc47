"""The graph of a model, by PyTorch's dynamo exporter."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor

from dinov2_attn.apps.export.subject import Subject
from dinov2_attn.apps.viz.inference import summary_of
from dinov2_attn.errors import Dinov2AttnError, InvalidInputError, UnavailableError

BATCH = "batch"


def require_exporter() -> None:
    """Raise ``UnavailableError`` if this PyTorch has no exporter with dynamic shapes."""
    if "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters:
        raise UnavailableError(
            "PyTorch 2.6 or later, whose exporter knows dynamic shapes",
            torch.__version__,
            "Run `pip install --upgrade torch`.",
        )


def exported(subject: Subject, images: Tensor, name: str, opset: int | None) -> Any:
    """Return the program of ``subject``, which takes batches of any size.

    Raises:
        InvalidInputError: If the model cannot be exported.

    """
    wrapped, names = subject.wrapped().eval(), subject.names
    options: dict[str, Any] = {} if opset is None else {"opset_version": opset}
    try:
        with wrapped.watched(), _quiet():
            program: Any = torch.onnx.export(
                wrapped,
                (images,),
                dynamo=True,
                input_names=[name],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim(BATCH)},),
                verbose=False,
                **options,
            )
    except Dinov2AttnError:
        raise
    except Exception as error:  # the exporter, or code of the model, may raise anything
        cause = error.__cause__ or error
        raise InvalidInputError(
            "a model that torch.export can trace and ONNX can express",
            summary_of(cause if isinstance(cause, Exception) else error),
            "Export a model on the CPU without xFormers (XFORMERS_DISABLED=1), with a newer "
            "PyTorch, or see what torch.export.export(model, (images,)) says.",
        ) from error
    _check_opset(program.model.opset_imports.get(""), opset)
    return program


def _check_opset(written: int | None, wanted: int | None) -> None:
    """Raise ``InvalidInputError`` if the exporter kept its own opset, of which it only warns."""
    if wanted is not None and written != wanted:
        raise InvalidInputError(
            "an opset that the exporter can write this model in",
            f"{wanted}, where it writes {written}",
            f"Leave it out, or give {written} or a later one.",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Say nothing of the exporter's own progress, its warnings of other uses included."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
