"""The kernel calls of the layers of one pass, in the order in which they run.

They say all about the weights: queries, keys, scale and bias. Those of all layers are kept, which
takes O(N · C) memory for each layer. Explicit code has made its matrix already, which is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from torch import Tensor, nn

from dinov2_attn.backbone.layout import Layout
from dinov2_attn.backbone.structure import name_of
from dinov2_attn.errors import InvalidInputError, NotRecordedError
from dinov2_attn.grafting.channel import Receiver, prove_once, recording, unrecorded
from dinov2_attn.grafting.tokens import Tokens
from dinov2_attn.kernels.call import KernelCall
from dinov2_attn.kernels.capture import StopPassError
from dinov2_attn.maps.layers import Recorded, kind_of, recorded_in
from dinov2_attn.typing import RecordedLayers


@dataclass(eq=False)
class Calls(Receiver):
    """A receiver that keeps what the kernels of some layers were given.

    Attributes:
        modules: The attention modules of the model.
        whole: Whether the pass runs to its end.
        found: Attention modules and their calls, without values, in the order of the pass.

    """

    modules: Recorded
    whole: bool = False
    found: list[tuple[nn.Module, KernelCall]] = field(default_factory=list)

    @property
    def stops(self) -> bool:
        """Whether the next layer is the last one, of a model that is a DINOv2 itself."""
        needed = len(self.modules.wanted)
        return self.modules.is_backbone and not self.whole and len(self.found) + 1 == needed

    def wants(self, attention: nn.Module) -> bool:
        """Return whether ``attention`` is that of a wanted layer."""
        return attention in self.modules.wanted

    def take(self, attention: nn.Module, call: KernelCall) -> None:
        """Keep the call."""
        prove_once(attention, call, f"layer {self.modules.wanted[attention]}")
        self.found.append((attention, call.kept()))

    def take_all(self) -> list[KernelCall]:
        """Return the calls, and keep none of them here."""
        calls = [call for _, call in self.found]
        self.found.clear()
        return calls

    def layout(self, images: Tensor) -> Layout:
        """Return where the patches are among the tokens of the calls.

        Raises:
            InvalidInputError: If no patch grid is found.

        """
        attention, call = self.found[0]
        modules = self.modules
        sibling = next(iter(modules.all))
        tokens = Tokens(modules.whole, modules.backbone, attention, call.columns, images, sibling)
        layout = tokens.layout()
        if layout is None:
            raise InvalidInputError(
                "a model whose patches are found among its tokens",
                f"no grid among {call.columns} tokens of {name_of(type(modules.whole))}",
                "Take the matrices of a pass: with record(model, grid=(h, w), prefix=p) as maps.",
            )
        return layout


def calls_of_pass(
    model: nn.Module, layers: RecordedLayers, run: Callable[[], object], *, whole: bool = False
) -> Calls:
    """Return the kernel calls of ``layers`` in one pass, which runs to its end if ``whole``.

    Each layer has one, and all of them are square and of one shape.

    Raises:
        InvalidInputError: If layers are of several kinds.
        NotRecordedError: If a layer that was named did not run, or a layer ran more than once.

    """
    calls = Calls(recorded_in(model, layers), whole)
    keep_calls(calls, model, layers, run)
    return calls


def keep_calls(
    calls: Calls, model: nn.Module, layers: RecordedLayers, run: Callable[[], object]
) -> None:
    """Let ``calls`` keep those of one pass. Raises what ``calls_of_pass`` raises."""
    check_depth(model)
    with unrecorded(), recording(calls, calls.modules.wanted), suppress(StopPassError):
        run()
    _check_complete(calls)
    _check_kinds(calls, layers)


def check_depth(model: nn.Module) -> None:
    """Raise ``InvalidInputError`` if a pass would drop samples of a batch."""
    if any(m.training and getattr(m, "sample_drop_ratio", 0) for m in model.modules()):
        raise InvalidInputError(
            "a pass in which every layer sees every sample",
            "a model in training with stochastic depth",
            "Call model.eval() first.",
        )


def _check_complete(calls: Calls) -> None:
    ran = [module for module, _ in calls.found]
    missing = len(set(calls.modules.wanted) - set(ran)) if calls.modules.is_chosen else 0
    if ran and len(set(ran)) == len(ran) and not missing:
        return
    raise NotRecordedError(
        "each layer to run once in a pass",
        f"{len(ran)} calls of {len(set(ran))} layers"
        + (f", and {missing} did not run" if missing else ""),
        "See which layers run, and how often: with record(model) as maps: model(images).",
    )


def _check_kinds(calls: Calls, layers: RecordedLayers) -> None:
    names = [calls.modules.wanted[module] for module, _ in calls.found]
    kinds = list(dict.fromkeys(map(kind_of, names))) if layers is None else []
    shapes = list(dict.fromkeys((call.batch, call.rows, call.columns) for _, call in calls.found))
    if len(kinds) < 2 and len(shapes) == 1 and shapes[0][1] == shapes[0][2]:
        return
    raise InvalidInputError(
        "layers whose tokens are the same: one follows the other",
        ", ".join(kinds) if len(kinds) > 1 else f"(B, Q, N) of {', '.join(map(str, shapes))}",
        "Name the layers of one kind: layers=[...]. record(model) shows their names.",
    )
