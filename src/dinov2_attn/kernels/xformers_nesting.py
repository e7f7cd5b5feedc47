"""Lists of tensors through upstream's own nested path, where it is open."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from dinov2_attn.errors import NoOperatorError
from dinov2_attn.kernels.xformers_flags import runs_nested


def can_nest(model: Any, blocks: Iterable[nn.Module], images: Sequence[Tensor]) -> bool:
    """Say whether upstream would run ``images`` through ``blocks`` in one, and could.

    Its masks know no sequence of a batch without samples.
    """
    takes_lists = hasattr(model, "forward_features_list")
    return takes_lists and all(map(len, images)) and all(map(runs_nested, blocks))


def check_stochastic_depth(block: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Raise ``NoOperatorError`` where ``block`` would drop samples of a nested list off a GPU.

    Upstream selects and adds them by ``index_select_cat`` and ``scaled_index_add``, which
    xFormers has for CUDA only.
    """
    ratio = getattr(block, "sample_drop_ratio", 0.0)
    devices = {tensor.device.type for tensor in tensors}
    if block.training and ratio > 0 and runs_nested(block) and devices != {"cuda"}:
        raise NoOperatorError(
            "nested tensors on a CUDA device, or no stochastic depth: in training upstream drops "
            "samples of a list with operators that xFormers has for CUDA only",
            f"a list on {', '.join(sorted(devices))} in training, with a drop path of {ratio:g}",
            "Call model.eval(), build with drop_path_rate=0, or ask tensor by tensor.",
        )
