"""Linear classifiers on a DINOv2: those of Meta's hub, and those that a checkpoint holds.

Upstream's classifiers read CLS and the mean of the patches, of the last layer or of the last four.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_attn.apps.weights.reading import Checkpoint, read
from dinov2_attn.apps.weights.source import load_published
from dinov2_attn.errors import UnreadableFileError, in_one_line

# The names of the linear layer in upstream's classifiers and in those of transformers.
_WEIGHT = re.compile(r"(?:.*\.)?(?:linear_head|classifier)\.weight")


class LinearClassifier(nn.Module):
    """A linear layer on CLS and the mean of the patches.

    Args:
        backbone: A DINOv2.
        linear: Takes the CLS tokens of the last layers and the mean patch of the last one.

    """

    def __init__(self, backbone: Any, linear: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.linear = backbone, linear
        self.layers = linear.in_features // backbone.embed_dim - 1

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(B, classes)``."""
        found = self.backbone.get_intermediate_layers(
            images, n=self.layers, return_class_token=True
        )
        patches = found[-1][0].mean(dim=1)
        logits: Tensor = self.linear(torch.cat([*(cls for _, cls in found), patches], dim=1))
        return logits


def of_hub(backbone: nn.Module, name: str, *, registers: bool, random: bool) -> LinearClassifier:
    """Return the classifier of ImageNet's 1000 classes that Meta publishes for ``name``.

    Args:
        backbone: The model of that name.
        name: Its name on the hub without registers, such as ``dinov2_vits14``.
        registers: Whether it has registers.
        random: Whether to leave the weights as PyTorch draws them.

    Raises:
        UnavailableError: If the file is not there and cannot be downloaded.
        UnreadableFileError: If it holds something else.

    """
    linear = nn.Linear(5 * int(backbone.embed_dim), 1000)  # type: ignore[arg-type]
    if not random:
        file = f"{name}{'_reg4' if registers else ''}_linear4_head.pth"
        load_published(f"{name}/{file}", lambda path: _fill(linear, path))
    return LinearClassifier(backbone, linear).eval()


def of_checkpoint(backbone: nn.Module, checkpoint: Checkpoint) -> LinearClassifier | None:
    """Return the classifier in a checkpoint of ``backbone``, None if it holds none.

    Those of upstream (``linear_head``) and of transformers (``classifier``) are known.
    """
    width = int(backbone.embed_dim)  # type: ignore[arg-type]
    for name, weight in checkpoint.tensors.items():
        bias = checkpoint.tensors.get(f"{name.removesuffix('weight')}bias")
        if not _WEIGHT.fullmatch(name) or bias is None or weight.ndim != 2:
            continue
        if weight.shape[1] in (2 * width, 5 * width) and bias.shape == weight.shape[:1]:
            linear = nn.Linear(weight.shape[1], weight.shape[0])
            linear.load_state_dict({"weight": weight, "bias": bias})
            return LinearClassifier(backbone, linear).eval()
    return None


def _fill(linear: nn.Linear, path: Path) -> None:
    tensors = dict(read(path).tensors)
    try:
        linear.load_state_dict(tensors)
    except RuntimeError as error:
        raise UnreadableFileError(
            f"the linear layer of a classifier, {linear.in_features} to {linear.out_features}",
            f"{path}, which has others ({in_one_line(error)[:200]})",
            "It is the file of another classifier. Remove it and run again.",
        ) from error
