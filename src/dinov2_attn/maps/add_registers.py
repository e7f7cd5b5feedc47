"""Test-time registers: tokens that take the activations of artifact tokens, in a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from dinov2_attn._compat import raised_by_dynamo
from dinov2_attn.backbone.backbone import Backbone, backbone_in
from dinov2_attn.backbone.mlps import Mlp, mlps_of
from dinov2_attn.backbone.structure import name_of
from dinov2_attn.errors import InvalidInputError, NotEditedError, OutOfRangeError
from dinov2_attn.grafting.interventions import Intervention, in_a_graph, intervening
from dinov2_attn.maps.register_neurons import RegisterNeurons
from dinov2_attn.math.selection import layers_to_take, whole_number
from dinov2_attn.typing import Model


@contextmanager
def add_registers(
    model: Model,
    neurons: RegisterNeurons | Mapping[int, SupportsIndex | Sequence[SupportsIndex]],
    count: int = 1,
) -> Iterator[None]:
    """Add test-time registers to every forward pass of this thread inside a ``with`` block.

    >>> neurons = find_register_neurons(model, images)
    >>> with add_registers(model, neurons):
    ...     features = model(images)
    ...     artifact_tokens(model, images)       # none are left, if the neurons were the right ones
    >>> with add_registers(model, {12: [5, 17], 13: [40]}):        # neurons that are known
    ...     features = model(images)

    Large models keep global information in a few patches, whose norms and attention are outliers.
    Here this moves to a token of its own, without training:

    - ``count`` tokens of zeros come behind the model's own registers, in front of the patches. The
      model counts them as its registers: so do its own methods, and ``"registers"``, ``prefix`` and
      maps of this package.
    - Each of ``neurons`` is moved. In every new token it has the activation of the token where it
      is largest in absolute value, with its sign. It is zero in all patches. CLS and the model's
      own registers keep theirs. The largest may be that of a new token, made an outlier before.

    Each image has its own largest activations. All of the model's own passes work, such as
    ``get_intermediate_layers``, and ``record``, ``edit``, ``rollout``, ``artifact_tokens`` and
    ``get_self_attention`` see the new tokens. Gradients flow. Parameters, ``state_dict``, copies
    and pickles of the model are as without, and so are other threads and other models. After the
    block, and after any exception in it, the model is as before bit for bit.

    With ``use_reentrant=True`` of PyTorch's checkpointing, the backward pass has to run inside the
    block.

    Args:
        model: A DINOv2 or a DINOv3, or a module that contains one.
        neurons: What ``find_register_neurons`` returns, or a mapping from blocks to neurons.
        count: The number of new tokens, which are all alike.

    Raises:
        InvalidInputError: If the model does not count its registers, as the first revisions of
            DINOv2, or an argument is of the wrong kind.
        OutOfRangeError: If there is no such block or neuron.
        NotEditedError: If a pass cannot be changed: several images of a list in one sequence,
            a compiled or exported model, a kernel that hides the neurons. At the end of the block,
            if no pass ran in it.

    Source: Jiang et al., *Vision Transformers Don't Need Trained Registers*, 2025
    (arXiv 2506.08010), section 4. Their code gives all neurons of a layer the largest activation
    of any of them. Here each neuron keeps its own.

    """
    backbone = backbone_in(model)
    mlps = mlps_of(backbone)
    chosen = _chosen(neurons, backbone, mlps)
    count = whole_number(count, "count, the number of registers,")
    if count < 1:
        raise InvalidInputError(
            "count, the number of registers, to be 1 or more",
            str(count),
            "Leave it out for one register.",
        )
    first = backbone.prefix
    moves = [(mlps[layer], _Move(own, first, count)) for layer, own in chosen.items()]
    one = Intervention(backbone, moves, count)
    try:
        with intervening(one):
            yield
    except Exception as error:
        # Dynamo wraps what is raised while it traces, and keeps only the words.
        if raised_by_dynamo(error) and NotEditedError.__name__ in str(error):
            raise in_a_graph() from error
        raise
    if not one.passes:
        raise NotEditedError(
            "the model to run inside the block",
            f"no pass of {name_of(type(backbone.model))}",
            "Run it inside the block, in the same thread, as an eager module: no exported, "
            "scripted or replicated one, and of a compiled one compiled._orig_mod(images).",
        )


class _Move:
    """Moves some neurons of an MLP to the new tokens."""

    def __init__(self, neurons: list[int], first: int, count: int) -> None:
        self._neurons = neurons
        self._new = slice(first, first + count)
        self._patches = slice(first + count, None)

    def __call__(self, neurons: Tensor) -> Tensor:
        """Return ``neurons (B, N, H)`` with those of the patches moved."""
        index = torch.tensor(self._neurons, device=neurons.device)
        chosen = neurons[..., index]
        largest = chosen.gather(1, chosen.abs().argmax(1, keepdim=True))
        moved = neurons.clone()
        moved[:, self._new, index] = largest.expand(-1, self._new.stop - self._new.start, -1)
        moved[:, self._patches, index] = 0
        return moved


def _chosen(neurons: Any, backbone: Backbone, mlps: list[Mlp]) -> dict[int, list[int]]:
    """Return the numbers of the neurons of each block, each once.

    Raises:
        InvalidInputError: If ``neurons`` is no mapping, or empty.
        OutOfRangeError: If there is no such block or neuron.

    """
    given = neurons.by_layer() if isinstance(neurons, RegisterNeurons) else neurons
    chosen: dict[int, dict[int, None]] = {}
    for key, values in given.items() if isinstance(given, Mapping) else ():
        layer = layers_to_take([key], backbone.depth)[0]
        own = _numbers(values, mlps[layer].last.in_features, layer)
        chosen.setdefault(layer, {}).update(dict.fromkeys(own))
    if not any(chosen.values()):
        raise InvalidInputError(
            "neurons by block, at least one",
            "none" if isinstance(given, Mapping) else type(neurons).__name__,
            "Pass what find_register_neurons(model, images) returns, or a mapping such as "
            "{3: [17, 4]}.",
        )
    return {layer: list(own) for layer, own in chosen.items() if own}


def _numbers(values: Any, neurons: int, layer: int) -> list[int]:
    values = values.tolist() if hasattr(values, "tolist") else values
    several = values if isinstance(values, Sequence) else [values]
    found = [whole_number(value, "neurons") for value in several]
    if wrong := [i for i in found if not -neurons <= i < neurons]:
        raise OutOfRangeError(
            f"neurons between {-neurons} and {neurons - 1} in block {layer}",
            ", ".join(map(str, wrong)),
            "Neurons are the inputs of the last linear layer of the MLP, counted from 0.",
        )
    return [i % neurons for i in found]
