"""Register neurons: the neurons that fire at artifact tokens, and make their norms large."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dinov2_attn.backbone.backbone import Backbone, backbone_in
from dinov2_attn.backbone.mlps import Mlp, mlps_of
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.grafting.channel import unrecorded
from dinov2_attn.grafting.interventions import Intervention, intervening
from dinov2_attn.maps import _facts
from dinov2_attn.maps.artifacts import ArtifactTokens
from dinov2_attn.maps.find_artifacts import artifact_tokens
from dinov2_attn.maps.one_batch import batches_of
from dinov2_attn.maps.result import Result
from dinov2_attn.math.selection import whole_number
from dinov2_attn.typing import Images, Layers, Model


@dataclass(frozen=True, eq=False, repr=False)
class RegisterNeurons(Result):
    """Neurons of some MLPs, those that fire most at artifact tokens first.

    Attributes:
        layers: int64 ``(K,)``: the block of each neuron, counted from 0.
        neurons: int64 ``(K,)``: its place among the inputs of the MLP's last linear layer.
        scores: ``(K,)``: its mean absolute activation at artifact tokens.

    """

    layers: Tensor
    neurons: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.layers)

    def by_layer(self) -> dict[int, list[int]]:
        """Return the neurons of each block: ``{3: [17, 4]}``."""
        found: dict[int, list[int]] = {}
        for layer, neuron in zip(self.layers.tolist(), self.neurons.tolist(), strict=True):
            found.setdefault(layer, []).append(neuron)
        return dict(sorted(found.items()))

    def _facts(self) -> dict[str, str]:
        if self.layers.is_meta:
            return {"neurons": f"{len(self)}"}
        return {"neurons": f"{len(self)}", "layers": _facts.layers([*self.by_layer()])}


@torch.no_grad()
def find_register_neurons(
    model: Model,
    images: Images,
    top: int = 10,
    *,
    layers: Layers = None,
    artifacts: ArtifactTokens | Sequence[ArtifactTokens] | None = None,
) -> RegisterNeurons:
    """Return the neurons of ``model`` that fire most at the artifact tokens of ``images``.

    >>> neurons = find_register_neurons(model, images)
    >>> with add_registers(model, neurons):
    ...     output = model(images)

    A neuron is an input of the last linear layer of an MLP: behind the activation, and of a SwiGLU
    behind its product. Its score is its mean absolute activation at the artifact tokens of an
    image, mean of the images that have some. The cost is that of ``artifact_tokens`` and one more
    pass. A few dozen images are better than one.

    Args:
        model: A DINOv2 or a DINOv3, or a module that contains one.
        images: ``(B, C, H, W)``, or a list of such batches.
        top: How many neurons to return.
        layers: The blocks to search: an int for the last so many, or a sequence. ``None``: those up
            to the block after which ``artifact_tokens`` reads norms.
        artifacts: What ``artifact_tokens(model, images)`` returns, if it is known or was asked
            with other thresholds.

    Returns:
        The neurons with the highest scores, the highest first, on the device of the model.

    Raises:
        InvalidInputError: If no image has an artifact token, or an argument is of the wrong kind
            or shape.
        OutOfRangeError: If there is no such block.
        NotEditedError: If the neurons of an MLP cannot be seen.

    Source: Jiang et al., *Vision Transformers Don't Need Trained Registers*, 2025
    (arXiv 2506.08010), section 3.

    """
    backbone = backbone_in(model)
    batches = [batch for batch, _ in batches_of(backbone.model, images, None)]
    found = _artifacts_of(backbone, batches, artifacts)
    mlps = mlps_of(backbone)
    chosen = _up_to(found) if layers is None else backbone.layers(layers)
    sums = _Sums()
    with unrecorded():
        for batch, one in zip(batches, found, strict=True):
            sums.add(one.mask, _activations(backbone, [(i, mlps[i]) for i in chosen], batch, one))
    return _best(sums.means(), whole_number(top, "top, the number of neurons,"))


def _artifacts_of(backbone: Backbone, batches: list[Tensor], given: Any) -> list[ArtifactTokens]:
    """Return the artifact tokens of each of ``batches``.

    Raises:
        InvalidInputError: If they are not those of these images, or there are none.

    """
    if given is None:
        given = artifact_tokens(backbone.model, batches)
    found: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    expected = [str((len(batch), *backbone.grid(batch))) for batch in batches]
    shapes = [_shape_of(one) for one in found]
    if shapes != expected:
        raise InvalidInputError(
            f"artifact tokens of these images: masks {', '.join(expected)}",
            ", ".join(shapes) or "none",
            "Pass what artifact_tokens(model, images) returns for the same images.",
        )
    if not any(bool(one.mask.any()) for one in found):
        raise InvalidInputError(
            "images of which at least one has an artifact token",
            f"none in {sum(map(len, batches))} images",
            "Try more images, or artifacts=artifact_tokens(model, images, layer=..., floor=...). "
            "Small models have no artifact tokens: then no registers are needed.",
        )
    return found


def _shape_of(artifacts: object) -> str:
    if isinstance(artifacts, ArtifactTokens) and isinstance(artifacts.mask, Tensor):
        return str(tuple(artifacts.mask.shape))
    return type(artifacts).__name__


def _up_to(found: list[ArtifactTokens]) -> list[int]:
    """Return the blocks up to the last one after which artifacts were seen."""
    last = max(int(one.layer[one.mask.flatten(1).any(1)].max()) for one in found if one.mask.any())
    return list(range(last + 1))


def _activations(
    backbone: Backbone, mlps: list[tuple[int, Mlp]], images: Tensor, artifacts: ArtifactTokens
) -> dict[int, Tensor]:
    """Return the mean absolute activation of each neuron at the artifacts, ``(B, H)`` by block."""
    mask = artifacts.mask.flatten(1).to(images.device)
    found: dict[int, Tensor] = {}

    def see(layer: int, neurons: Tensor) -> Tensor:
        patches = neurons[:, backbone.prefix :].to(torch.promote_types(neurons.dtype, _LEAST))
        # Not a product with the mask: other patches may be infinite.
        sums = patches.abs().masked_fill(~mask[..., None], 0).sum(1)
        found[layer] = sums / mask.sum(1, keepdim=True).clamp_min(1)
        return neurons

    changes = [(mlp, partial(see, layer)) for layer, mlp in mlps]
    with intervening(Intervention(backbone, changes, lengths=[backbone.length(images)])):
        backbone.model(images)
    return found


# Halves are summed in this dtype.
_LEAST = torch.float32


class _Sums:
    """Means over the images that have artifacts, batch by batch."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._images = 0

    def add(self, mask: Tensor, activations: dict[int, Tensor]) -> None:
        """Add ``activations (B, H)`` of the images in whose ``mask (B, h, w)`` is a patch."""
        self._images += int(mask.flatten(1).any(1).sum())
        for layer, values in activations.items():  # zero in images without artifacts
            total = values.sum(0)
            self._sums[layer] = self._sums[layer] + total if layer in self._sums else total

    def means(self) -> dict[int, Tensor]:
        """Return the mean of each neuron, ``(H,)`` by block."""
        return {layer: total / self._images for layer, total in sorted(self._sums.items())}


def _best(means: dict[int, Tensor], top: int) -> RegisterNeurons:
    """Return the ``top`` neurons with the largest of ``means``, ``(H,)`` by block."""
    places = list(_places(means))
    if not 0 < top <= len(places):
        raise InvalidInputError(
            f"top between 1 and {len(places)}, the number of neurons in these layers",
            str(top),
            "Leave it out for 10, or search more layers: layers=range(...).",
        )
    scores, order = torch.cat([*means.values()]).topk(top)
    chosen = torch.tensor([places[i] for i in order.tolist()], device=scores.device)
    return RegisterNeurons(chosen[:, 0], chosen[:, 1], scores)


def _places(means: dict[int, Tensor]) -> Iterator[tuple[int, int]]:
    for layer, values in means.items():
        for neuron in range(len(values)):
            yield layer, neuron
