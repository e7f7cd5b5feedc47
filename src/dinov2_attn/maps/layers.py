"""Which attention modules a recording takes, what they are called, and which of them ran."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from torch import nn

from dinov2_attn._locks import cached_property
from dinov2_attn.backbone.backbone import Backbone, transformers_in
from dinov2_attn.backbone.structure import attention_modules, image_entrances, name_of
from dinov2_attn.errors import IncompatibleUpstreamError, InvalidInputError, OutOfRangeError
from dinov2_attn.math.selection import layers_to_take
from dinov2_attn.typing import Layer, RecordedLayers


@dataclass(frozen=True)
class Recorded:
    """The attention modules of a model, and which of them to record.

    Blocks of a DINOv2 have numbers. In any other model attention modules go by their paths.

    Attributes:
        all: The attention modules in the order of definition, with what they are called.
        wanted: Those to record.
        others: The rest.
        backbone: The one DINOv2, or None for any other model.
        entrances: The modules that are given the images.
        whole: The model itself.
        is_chosen: Whether each pass has to run all of ``wanted``.

    """

    all: dict[nn.Module, Layer]
    wanted: dict[nn.Module, Layer]
    others: dict[nn.Module, Layer]
    backbone: Backbone | None
    entrances: list[nn.Module]
    whole: nn.Module
    is_chosen: bool

    @cached_property
    def count(self) -> int:
        """Return the number of layers to record."""
        return len(set(self.wanted.values()))

    @property
    def is_backbone(self) -> bool:
        """Whether the model is a DINOv2 itself."""
        return self.backbone is not None and self.backbone.model is self.whole

    def takes_images(self, module: nn.Module) -> bool:
        """Return whether ``module`` is given images of this model, and is no other of its class."""
        return module is self.whole or module in self.entrances


def recorded_in(model: object, layers: RecordedLayers, *, every: bool = False) -> Recorded:
    """Return the attention modules of ``model``, those that ``layers`` names apart.

    Args:
        model: Any module with attention inside.
        layers: As for ``record``.
        every: Whether a DINOv2 is one part among others if there is attention beside it.

    Raises:
        InvalidInputError: If ``model`` is no module, or has no attention, or ``layers`` names none.
        OutOfRangeError: If there is no such layer.

    """
    if not isinstance(model, nn.Module):
        raise InvalidInputError(
            "a model: a torch.nn.Module with attention inside",
            f"{type(model).__name__}",
            "Pass the module whose forward will run.",
        )
    transformers = transformers_in(model)
    backbone = Backbone(transformers[0]) if len(transformers) == 1 else None
    called: dict[nn.Module, Layer]
    if every and layers is None and backbone is not None and _attends_beside(model, backbone):
        backbone = None
    if backbone is not None and not has_paths(layers):
        called = dict(backbone.attentions())
        if backbone.shares_attention:
            raise IncompatibleUpstreamError(
                "an attention module of its own in each block",
                f"{len(called)} modules in more blocks",
                "Weights of shared modules cannot be told apart.",
            )
    else:
        called = {module: path for path, module in attention_modules(model).items()}
    if not called:
        raise _no_attention(model)
    chosen = _chosen(layers, list(dict.fromkeys(called.values())))
    return Recorded(
        all=called,
        wanted={module: name for module, name in called.items() if name in chosen},
        others={module: name for module, name in called.items() if name not in chosen},
        backbone=backbone,
        entrances=_entrances(model, backbone),
        whole=_without_wrappers(model),
        is_chosen=backbone is not None or layers is not None,
    )


def _attends_beside(model: nn.Module, backbone: Backbone) -> bool:
    """Return whether ``model`` has attention modules outside of the blocks of ``backbone``."""
    inside = backbone.attentions()
    return any(module not in inside for module in attention_modules(model).values())


@cache
def kind_of(layer: Layer) -> str:
    """Return what ``layer`` shares with others of its kind: its path without the numbers."""
    return re.sub(r"\d+", "*", layer) if isinstance(layer, str) else ""


def has_paths(layers: RecordedLayers) -> bool:
    """Return whether ``layers`` names the path of an attention module."""
    one = isinstance(layers, str)
    return one or (isinstance(layers, Sequence) and any(isinstance(i, str) for i in layers))


def _chosen(layers: RecordedLayers, known: list[Layer]) -> set[Layer]:
    """Return the names among ``known`` that ``layers`` means."""
    several = isinstance(layers, Sequence) and not isinstance(layers, str)
    given = list(layers) if several else [layers]  # type: ignore[arg-type]
    names = {name for name in given if isinstance(name, str)}
    if unknown := [name for name in names if name not in known]:
        near = get_close_matches(unknown[0], [str(name) for name in known], 1)
        raise OutOfRangeError(
            f"layers as paths of attention modules: {some_of(known)}",
            repr(unknown[0]),
            f"Did you mean {near[0]!r}?" if near else "Leave layers out for all.",
        )
    numbers: Any = [number for number in given if not isinstance(number, str)]
    taken = layers_to_take(numbers if several else numbers[0], len(known)) if numbers else []
    chosen = names | {known[number] for number in taken}
    if not chosen:
        raise InvalidInputError(
            "at least one layer to record", f"layers={layers!r}", "Leave layers out for all."
        )
    return chosen


def some_of(known: Sequence[Layer]) -> str:
    """Return the names of layers for a message, of many the first two and the last."""
    names = list(map(str, known))
    return ", ".join(names if len(names) < 5 else [*names[:2], "…", names[-1]])


def _no_attention(model: nn.Module) -> InvalidInputError:
    own = any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    return InvalidInputError(
        "a model with attention modules, whose code names scaled_dot_product_attention, "
        "memory_efficient_attention or softmax",
        f"none in {name_of(type(model))}" + (" but PyTorch's nn.MultiheadAttention" if own else ""),
        "PyTorch's own module returns its weights itself: module(x, x, x, need_weights=True)."
        if own
        else "Pass the model that contains the attention, not compiled, exported or scripted.",
    )


def _entrances(model: nn.Module, backbone: Backbone | None) -> list[nn.Module]:
    if backbone is None:
        return image_entrances(model)
    embedding = getattr(backbone.model, "patch_embed", None)
    return [embedding] if isinstance(embedding, nn.Module) else image_entrances(backbone.model)


def _without_wrappers(model: nn.Module) -> nn.Module:
    """Return the outermost module of ``model`` that is not PyTorch's."""
    while type(model).__module__.partition(".")[0] == "torch":
        children = list(model.children())
        if len(children) != 1:
            break
        model = children[0]
    return model


# Calls that a message names.
NAMED = 3


class Course:
    """The blocks of each pass, in the order in which they ran. Equal passes are kept once."""

    def __init__(self) -> None:
        self._whole: dict[tuple[Layer, ...], None] = {}
        self._partial: dict[tuple[Layer, ...], None] = {}
        self._now: list[Layer] = []

    def ran(self, layer: Layer) -> None:
        """Note that block ``layer`` ran."""
        self._now.append(layer)

    def end(self, *, whole: bool) -> None:
        """Note the end of a pass; a ``whole`` one ran all of its layers."""
        if self._now:
            (self._whole if whole else self._partial)[tuple(self._now)] = None
        self._now = []

    def describe(self, wanted: Sequence[Layer]) -> str:
        """Return which of the blocks ``wanted`` ran, and which did not."""
        ran = [layer for layer in wanted if layer in self._layers()]
        missing = [layer for layer in wanted if layer not in ran]
        changing = [i for i in ran if len({p.count(i) for p in self._passes} | {1}) > 1]
        parts = [f"{_blocks(ran)} ran" if ran else "none of them ran"]
        parts += [f"{_blocks(missing)} did not"] if missing else []
        parts += [f"{_blocks(changing)} not exactly once in each pass"] if changing else []
        others = [] if ran else [layer for layer in self._layers() if layer not in wanted]
        parts += [f"{_blocks(others)} ran instead"] if others else []
        return ", ".join(parts)

    def calls(self, wanted: Sequence[Layer]) -> list[str]:
        """Return the calls that together record every block that ran, the largest first.

        They name the blocks ``wanted``, or all blocks if none of those ran.
        """
        ran = self._layers()
        groups = self._together([i for i in wanted if i in ran] or ran)
        return [f"record(model, {group})" for group in groups]

    @property
    def _passes(self) -> tuple[tuple[Layer, ...], ...]:
        """All passes if one was partial: a call has to record the whole ones too."""
        return (*self._partial, *self._whole) if self._partial else ()

    def _layers(self) -> list[Layer]:
        found = dict.fromkeys(layer for one in self._passes for layer in one)
        return sorted(found, key=lambda layer: layer if isinstance(layer, int) else 0)

    def _together(self, layers: Iterable[Layer]) -> list[list[Layer]]:
        """Return ``layers`` in groups that ran equally often in each pass."""
        alike: dict[tuple[int, ...], list[Layer]] = {}
        for layer in layers:
            alike.setdefault(tuple(one.count(layer) for one in self._passes), []).append(layer)
        groups: list[list[Layer]] = []
        for group in alike.values():
            groups += [group] if self._are_whole(group) else [[layer] for layer in group]
        return sorted(groups, key=len, reverse=True)

    def _are_whole(self, group: list[Layer]) -> bool:
        """Return whether the blocks of ``group`` ran in turns, each once in a turn.

        They ran equally often in each pass, so the last turn is whole if all others are.
        """
        for one in self._passes:
            kept: set[Layer] = set()
            for layer in filter(group.__contains__, one):
                if layer in kept:
                    return False
                kept = kept | {layer} if len(kept) + 1 < len(group) else set()
        return True


def advice(calls: Sequence[str]) -> str:
    """Return the next step that names ``calls``."""
    first, *others = calls[:NAMED]
    together = "".join(f", {call} as maps_{i}" for i, call in enumerate(others, 2))
    together += ", and so on for each other block" if len(calls) > NAMED else ""
    return (
        f"Record the blocks that ran: with {first} as maps{together}. "
        "If an exception cut a pass short, let it leave the block."
    )


def _blocks(layers: Sequence[Layer]) -> str:
    return f"block{'' if len(layers) == 1 else 's'} {', '.join(map(str, layers))}"
