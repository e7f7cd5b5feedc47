"""``grafted``: a model as a type checker should see it after ``install``."""

from __future__ import annotations

from typing import cast

from torch import nn

from dinov2_attn.backbone.structure import name_of
from dinov2_attn.errors import InvalidInputError, NotGraftedError
from dinov2_attn.typing import GraftedVisionTransformer, Model

_ASKED = "get_self_attention"


def grafted(model: Model) -> GraftedVisionTransformer:
    """Return ``model`` itself, typed with the methods that ``install`` set on its class.

    >>> model = dinov2_attn.grafted(torch.hub.load("facebookresearch/dinov2", "dinov2_vits14"))
    >>> weights = model.get_last_self_attention(images)  # a Tensor, completed by an editor

    Nothing is changed or copied. If the model has no such methods but contains one vision
    transformer that has (a depth model, ``DistributedDataParallel``), that one is returned.

    Raises:
        NotGraftedError: If ``install`` has not reached the model.
        InvalidInputError: If it is no ``torch.nn.Module``, or contains several such transformers.

    """
    if not isinstance(model, nn.Module):
        raise InvalidInputError(
            "a model: a torch.nn.Module", type(model).__name__, "Pass the model, not its output."
        )
    if hasattr(model, _ASKED):  # wrappers of torch.compile and FSDP hand it on
        return cast(GraftedVisionTransformer, model)
    found = {name: m for name, m in model.named_modules() if hasattr(type(m), _ASKED)}
    if not found:
        raise NotGraftedError(
            "a vision transformer that install() has reached, or a model that contains one",
            name_of(type(model)),
            "Call dinov2_attn.install(model) first.",
        )
    if len(found) > 1:
        raise InvalidInputError(
            f"one grafted vision transformer inside {name_of(type(model))}",
            f"{len(found)}: {', '.join(found)}",
            "Pass the one to ask.",
        )
    return cast(GraftedVisionTransformer, next(iter(found.values())))
