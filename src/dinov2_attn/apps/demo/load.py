"""Load the demo model: upstream's classes, filled with ``model.safetensors`` of this folder."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from dinov2_attn import _imports
from dinov2_attn.errors import UnreadableFileError

PATH = Path(__file__).with_name("model.safetensors")

# The arguments of DinoVisionTransformer. Heads have 64 features, as everywhere upstream.
ARCHITECTURE: dict[str, Any] = {
    "img_size": 98,
    "patch_size": 14,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "init_values": 1.0,
    "block_chunks": 0,
}


def build(vision_transformer: Any = None) -> Any:
    """Build the model with random weights from torch's global generator.

    Args:
        vision_transformer: A module with upstream's classes. By default
            ``dinov2.models.vision_transformer`` is imported.

    """
    upstream = vision_transformer or import_module("dinov2.models.vision_transformer")
    block = partial(upstream.Block, attn_class=upstream.MemEffAttention)
    return upstream.DinoVisionTransformer(block_fn=block, **ARCHITECTURE)


def load_demo_model(vision_transformer: Any = None) -> Any:
    """Return the demo model in float32 and eval mode, on the CPU.

    >>> dinov2_attn.install()
    >>> load_demo_model().get_last_self_attention(images, queries="cls", heads="mean")

    Images are ``(B, 3, H, W)`` with sides that are multiples of 14 pixels, normalised by
    ImageNet's mean and standard deviation.

    Args:
        vision_transformer: A module with upstream's classes. By default
            ``dinov2.models.vision_transformer`` is imported.

    Raises:
        UnavailableError: If the library safetensors is missing.
        UnreadableFileError: If the file of the package is damaged.

    """
    return fill(build(vision_transformer), PATH)


def fill(model: Any, path: Path) -> Any:
    """Fill ``model`` with the weights at ``path`` and return it in eval mode, without gradients."""
    library = _imports.safetensors()
    try:
        model.load_state_dict(library.torch.load_file(path))
    except Exception as error:  # the reader can raise anything
        raise UnreadableFileError(
            "the weights of this package",
            f"{path} ({type(error).__name__}: {error})",
            "Reinstall the package.",
        ) from error
    return model.eval().requires_grad_(False)
