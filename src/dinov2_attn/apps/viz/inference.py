"""Running a model on images, which may fail: what upstream raises becomes an error of ours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dinov2_attn.errors import Dinov2AttnError, InvalidInputError, UnavailableError


@contextmanager
def inference_on(images: Tensor) -> Iterator[None]:
    """Run a model on ``images`` (B, C, H, W) inside, without autograd.

    Raises ``InvalidInputError`` for what the model raises; errors of ours, warnings that were made
    errors and what is no ``Exception`` (``KeyboardInterrupt``) stay as they are.
    """
    try:
        with torch.inference_mode():
            yield
    except (Dinov2AttnError, Warning):
        raise
    except Exception as error:  # upstream's code and hooks of the user's raise whatever they like
        found = f"one of {images.shape[2]} × {images.shape[3]}"
        raise cannot_run(error, found, "Give a smaller --image-size.") from error


def cannot_run(error: Exception, image: str, smaller: str) -> InvalidInputError:
    """Return the error for an ``image`` on which a model raised ``error``.

    ``smaller`` is the advice where it was one of memory.
    """
    advice = "Leave it out, or change the model or its hooks, which raised this."
    return InvalidInputError(
        "an image that the model can be run on here",
        f"{image} ({told(error)})",
        smaller if is_out_of_memory(error) else advice,
    )


def is_out_of_memory(error: Exception) -> bool:
    """Return whether a device, or this machine, had no memory left."""
    # The CPU's allocator has no class of its own for it.
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or any(
        said in str(error).lower()
        for said in ("can't allocate memory", "not enough memory", "out of memory")
    )


def told(error: Exception) -> str:
    """Return the class of ``error`` and the first line of its message, alike in every run.

    Without addresses of objects and without what else is on a device.
    """
    text = str(error).strip().partition("\n")[0]
    text = re.sub(r"\b0x[0-9a-fA-F]+", "0x…", text)
    if is_out_of_memory(error):
        text = re.split(r" \(?GPU \d| \(MPS", text)[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def check_alive(device: torch.device) -> None:
    """Raise ``UnavailableError`` if nothing can be computed on ``device`` any more.

    After an assertion on a GPU all that follows fails, whatever the image.
    """
    if device.type == "cpu":
        return
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:
        if not is_out_of_memory(error):
            raise UnavailableError(
                f"a device {device} that still works",
                told(error),
                "Start the program again; an extraction goes on when it is run again.",
            ) from error
