"""The MLP of each block, and its last linear layer, which is given the hidden activations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dinov2_attn._compat import submodules
from dinov2_attn.backbone.backbone import Backbone
from dinov2_attn.backbone.structure import name_of
from dinov2_attn.errors import InvalidInputError

# The last linear layer by upstream's names: of Mlp, and of SwiGLUFFN.
_LAST = ("fc2", "w3")


@dataclass(frozen=True)
class Mlp:
    """The MLP of one block.

    Attributes:
        module: The MLP.
        last: Its last linear layer. Its inputs are the neurons.

    """

    module: nn.Module
    last: nn.Linear


def mlps_of(backbone: Backbone) -> list[Mlp]:
    """Return the MLP of each block of ``backbone``.

    Raises:
        InvalidInputError: If a block has no MLP of its own that ends with a plain linear layer.

    """
    found = [_mlp_in(block) for block in backbone.blocks]
    known = [mlp for mlp in found if mlp is not None]
    if len({mlp.module for mlp in known}) == len(found):
        return known
    without = next((i for i, mlp in enumerate(found) if mlp is None), None)
    raise InvalidInputError(
        "an MLP in each block, with an nn.Linear named fc2 or w3 as its last layer",
        f"none in block {without} of {name_of(type(backbone.model))}"
        if without is not None
        else f"one in several blocks of {name_of(type(backbone.model))}",
        "Pass a DINOv2 or a DINOv3 as upstream builds it. Merge adapters such as LoRA into its "
        "weights first, and remove quantization and parametrizations.",
    )


def _mlp_in(block: nn.Module) -> Mlp | None:
    found = [
        (module, submodules(module)[name])
        for module in block.modules()
        for name in _LAST
        if name in submodules(module)
    ]
    if len(found) != 1:
        return None
    module, last = found[0]
    # Anything else may use its input in more than one product, or make its weight in each pass.
    if not isinstance(last, nn.Linear) or type(last).forward is not nn.Linear.forward:
        return None
    if "weight" not in last._parameters or "forward" in {*vars(last), *vars(module)}:
        return None
    return Mlp(module, last)
