"""The model that ships: built from upstream's classes, filled with the file beside this one."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from dinov2_attn import _optional
from dinov2_attn.errors import UnreadableFileError

PATH = Path(__file__).with_name("model.safetensors")

# What DinoVisionTransformer is built with. Heads are 64 wide, as everywhere upstream.
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
    """Build the model with random weights, from torch's global generator.

    ``vision_transformer`` is a module with upstream's classes, by default the importable
    ``dinov2.models.vision_transformer``.
    """
    upstream = vision_transformer or import_module("dinov2.models.vision_transformer")
    block = partial(upstream.Block, attn_class=upstream.MemEffAttention)
    return upstream.DinoVisionTransformer(block_fn=block, **ARCHITECTURE)


def load_demo_model(vision_transformer: Any = None) -> Any:
    """Return the model that ships, in float32 and eval mode, on the CPU.

    >>> dinov2_attn.install()
    >>> load_demo_model().get_last_self_attention(images, queries="cls", heads="mean")

    It takes images ``(B, 3, H, W)`` of whole patches of 14, normalised by ImageNet's mean and
    deviation. See ``build`` for the argument. Raises ``UnavailableError`` without the library
    safetensors and ``UnreadableFileError`` where the package is not as it was published.
    """
    return fill(build(vision_transformer), PATH)


def fill(model: Any, path: Path) -> Any:
    """Fill ``model`` with the weights at ``path`` and return it, ready to look at images."""
    library = _optional.safetensors()
    try:
        model.load_state_dict(library.torch.load_file(path))
    except Exception as error:  # the reader raises whatever foreign bytes provoke
        raise UnreadableFileError(
            "the weights that this package ships",
            f"{path} ({type(error).__name__}: {error})",
            "Install the package anew.",
        ) from error
    return model.eval().requires_grad_(False)
