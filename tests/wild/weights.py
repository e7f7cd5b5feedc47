"""Random weights that make attention sharp, and inputs. Both are the same in every call."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

PROJECTIONS = ("qkv", "query", "key", "q_proj", "k_proj", "to_q", "to_k", "in_proj")
SHARPER = 3.0


def sharp(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all parameters of ``model`` again, put it into eval mode and return it.

    With weights of ordinary size attention is almost uniform, and a wrong answer looks right.
    Weights of queries and keys are therefore ``SHARPER`` times as large.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float32)
            parameter.copy_(_drawn(name, parameter, noise))
    model.eval()  # its value is not used: some projects' eval() returns None
    return model


def _drawn(name: str, parameter: nn.Parameter, noise: Tensor) -> Tensor:
    owner, _, kind = name.rpartition(".")
    if parameter.ndim < 2:  # biases around 0; norms and layer scales around 1
        centre = SHARPER if owner.endswith(("q_norm", "k_norm")) else 1.0
        return 0.1 * noise + (0.0 if "bias" in kind else centre)
    fan_in = parameter[0].numel() if kind == "weight" else 1
    size = SHARPER if any(part in owner.split(".")[-1] for part in PROJECTIONS) else 1.0
    return noise * (size / math.sqrt(fan_in))


def images(*shape: int, seed: int = 1, channels: int = 3) -> Tensor:
    """Return noise ``(batch, channels, height, width)``, float32."""
    batch, height, width = shape
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=draw)
