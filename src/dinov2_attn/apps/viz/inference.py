"""Run a model on images, and raise errors of the package for what the model raises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dinov2_attn.errors import Dinov2AttnError, InvalidInputError, UnavailableError


@contextmanager
def inference_on(images: Tensor) -> Iterator[None]:
    """Run a model on ``images`` ``(B, C, H, W)`` in this block, without autograd.

    Raises:
        InvalidInputError: for what the model raises. Errors of the package, warnings turned into
            errors, and ``KeyboardInterrupt`` pass unchanged.

    """
    try:
        with torch.inference_mode():
            yield
    except (Dinov2AttnError, Warning):
        raise
    except Exception as error:  # upstream and hooks may raise anything
        found = f"one of {images.shape[2]} × {images.shape[3]}"
        raise cannot_run(error, found, "Give a smaller --image-size.") from error


def cannot_run(error: BaseException, image: str, smaller: str) -> InvalidInputError:
    """Return the error for an ``image`` on which a model raised ``error``.

    ``smaller`` is the advice if memory ran out.
    """
    advice = "Leave it out, or change the model or its hooks, which raised this."
    return InvalidInputError(
        "an image that the model can be run on here",
        f"{image} ({summary_of(error)})",
        smaller if is_out_of_memory(error) else advice,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device or this machine ran out of memory."""
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or any(
        said in str(error).lower()
        for said in ("can't allocate memory", "not enough memory", "out of memory")
    )


def summary_of(error: BaseException) -> str:
    """Return the class of ``error`` and the first line of its message, equal in every run.

    Addresses of objects and the state of a device are left out.
    """
    text = str(error).strip().partition("\n")[0]
    text = re.sub(r"\b0x[0-9a-fA-F]+", "0x…", text)
    if is_out_of_memory(error):
        text = re.split(r" \(?GPU \d| \(MPS", text)[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def check_alive(device: torch.device) -> None:
    """Raise ``UnavailableError`` if ``device`` no longer works.

    After a failed assertion on a GPU every later call fails, for any image.
    """
    if device.type == "cpu":
        return
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:
        if not is_out_of_memory(error):
            raise UnavailableError(
                f"a device {device} that still works",
                summary_of(error),
                "Start the program again; an extraction goes on when it is run again.",
            ) from error
