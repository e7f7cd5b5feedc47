"""Running a model on one photograph, which may be more than the device holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dinov2_attn.errors import Dinov2AttnError, InvalidInput


@contextmanager
def looking_at(images: Tensor) -> Iterator[None]:
    """Run a model on ``images`` (B, C, H, W) inside, without autograd.

    Raises ``InvalidInput`` where the device cannot run it on this many patches.
    """
    try:
        with torch.inference_mode():
            yield
    except (RuntimeError, MemoryError) as error:  # no memory on this device, as a rule
        if isinstance(error, Dinov2AttnError):
            raise
        raise InvalidInput(
            "an image that the model can be run on here",
            f"one of {images.shape[2]} × {images.shape[3]} ({str(error).partition(chr(10))[0]})",
            "Give a smaller --image-size.",
        ) from error
