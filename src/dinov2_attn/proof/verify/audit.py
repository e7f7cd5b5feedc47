"""What a copy itself returns as attention, and what that is."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_attn.proof.conformance.kernel_call import Calls, caught, has_two_branches
from dinov2_attn.proof.verify.describe import Said, Truth, close, describe
from dinov2_attn.proof.verify.findings import Finding
from dinov2_attn.proof.verify.offers import (
    Offer,
    Seen,
    kept,
    observe,
    of_model,
    of_modules,
    path_of,
    place_of,
    tensors,
)
from dinov2_attn.proof.verify.recipes import DROPPED

__all__ = ["Finding", "audit"]

_PYTORCH, _XFORMERS = "PyTorch", "xFormers"


def audit(
    model: nn.Module, images: Tensor, *, seconds: float = 60.0, name: str = "model"
) -> list[Finding]:
    """Ask a model for attention in every way that it offers itself, and say what comes back.

    These are methods such as ``get_last_self_attention``, keywords such as ``return_attention``
    and ``output_attentions``, attention modules that return a tuple, and tensors that a pass
    leaves in attributes. Each is compared with what the kernel was given. Where the code has a
    branch for xFormers, both branches are asked, with the definition of xFormers' kernel.

    Args:
        model: Any vision transformer, or a part of one, in any mode. Its modes are as before
            afterwards.
        images: A small batch of at least two images, ``(B, 3, H, W)``; or of tokens,
            ``(B, N, C)``, for a part.
        seconds: After this time no further way is asked.
        name: What findings call the model.

    Returns:
        The findings in the order of the code; nothing if the model offers no attention.

    """
    end = time.monotonic() + seconds
    kernels = (_PYTORCH, _XFORMERS) if has_two_branches(model) else ("",)
    with torch.no_grad(), _evaluating(model):
        found = [
            replace(finding, kernel=kernel)
            for kernel in kernels
            for finding in _Audit(model, images, kernel == _XFORMERS, end, name).findings()
        ]
    return _merged(found, len(kernels))


@dataclass(frozen=True)
class _Pass:
    """A result, what each module saw, and what each kernel was given."""

    output: Any
    seen: dict[str, Seen]
    calls: Calls


@dataclass(frozen=True)
class _Audit:
    """The audit of one branch of the code."""

    model: nn.Module
    images: Tensor
    xformers: bool
    end: float
    name: str

    @property
    def _given(self) -> str:
        return "images" if self.images.ndim == 4 else "tokens"

    def findings(self) -> Iterator[Finding]:
        try:
            ordinary = self._run(lambda: self.model(self.images))
        except Exception as error:  # foreign code can raise anything
            yield Finding(f"{self.name}({self._given})", f"raises {_in_words(error)}")
            return
        if not ordinary.calls:
            nothing = "no attention kernel was seen, so nothing is compared"
            yield Finding(f"{self.name}({self._given})", nothing)
            return
        own = of_model(self.model, self.name, self._given, self.images)
        for offer in (*own, *of_modules(ordinary.seen, self.name)):
            yield from self._answers(offer, ordinary)
        yield from _left(self.model, self.name, ordinary)

    def _run(self, run: Callable[[], Any]) -> _Pass:
        (output, seen), calls = caught(
            self.model, lambda: observe(self.model, run), xformers=self.xformers
        )
        return _Pass(output, seen, calls)

    def _answers(self, offer: Offer, ordinary: _Pass) -> Iterator[Finding]:
        if time.monotonic() > self.end:
            yield Finding(offer.where, "not asked: the time is over")
            return
        try:
            plain = ordinary if offer.plain is None else self._run(offer.plain)
            asked = self._run(offer.ask)
        except Exception as error:  # foreign code can raise anything
            yield Finding(offer.where, f"raises {_in_words(error)}")
            return
        before = [] if offer.plain is None else [part for _, part in tensors(plain.output)]
        new = [
            (path, part)
            for path, part in tensors(asked.output)
            if not any(close(part, other) for other in before)
        ]
        described = list(_described(offer.where, new, asked, plain))
        change = _change(asked, plain, before, new)
        yield from (one for one in described if not (change and one.verdict.startswith("unknown")))
        if not new:
            yield Finding(offer.where, _nothing(offer, asked.output))
        if change:
            yield Finding(offer.where, change)
        if any(finding.is_weights for finding in described) and self._drops(offer):
            yield Finding(offer.where, "in training: weights after dropout")

    def _drops(self, offer: Offer) -> bool:
        """Return whether dropout, half of the weights here, changes what the offer returns."""
        layers = [
            layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, nn.Dropout) and "att" in name.rpartition(".")[2]
        ]
        devices = [self.images.device] if self.images.device.type == "cuda" else []
        with _dropping(layers), torch.random.fork_rng(devices):
            asked = self._run(offer.ask)
        found = _described(offer.where, list(tensors(asked.output)), asked)
        return any(finding.verdict.startswith(DROPPED) for finding in found)


def _nothing(offer: Offer, output: Any) -> str:
    if offer.plain is None or output is None:
        return f"no tensor: {type(output).__name__}"
    return "nothing new: the same as without the keyword"


def _left(model: nn.Module, top: str, ordinary: _Pass) -> Iterator[Finding]:
    """Yield what an ordinary pass returns or keeps beside its features."""
    attending = [ordinary.seen[name] for name in ordinary.calls if name in ordinary.seen]
    for one in {type(one.module): one for one in attending}.values():
        if one.name and isinstance(one.output, list | tuple):
            parts = [part for part in tensors(list(one.output)) if not part[0].startswith("[0]")]
            where = f"{place_of(top, one.name)}(tokens)"
            yield from _described(where, parts, _only(ordinary, one.name))
    for name, attribute, part in kept(model):
        where = f"{place_of(top, name)}.{attribute}"
        own = _only(ordinary, name if name in ordinary.calls else None)
        yield from _described(f"{where} after a pass", [("", part)], own)


def _only(ordinary: _Pass, name: str | None) -> _Pass:
    """Return the pass with the calls of one attention module, of all for ``None``."""
    calls = ordinary.calls if name is None else {name: ordinary.calls[name]}
    return replace(ordinary, calls=calls)


def _described(
    where: str, parts: Sequence[tuple[str, Tensor]], asked: _Pass, plain: _Pass | None = None
) -> Iterator[Finding]:
    """Yield what the tensors of a result are; equal answers of one list are one finding."""
    plain = plain or asked
    names = list(plain.calls) or list(asked.calls)
    calls = {name: plain.calls.get(name, []) + asked.calls.get(name, []) for name in names}
    outputs = [*_features(plain, plain), *_features(asked, plain)]
    groups: dict[tuple[str, str], list[tuple[str, Said]]] = {}
    for list_path, members in _lists(parts):
        for i, (path, part) in enumerate(members):
            expected = names[i] if len(members) == len(names) else names[-1]
            said = describe(part, Truth(calls, expected, outputs))
            groups.setdefault((list_path, said.name), []).append((path, said))
    for (list_path, _), same in groups.items():
        place = same[0][0] if len(same) == 1 else f"{list_path}[{_first(same)} … {_final(same)}]"
        said = Said.joined([one for _, one in same])
        yield Finding(f"{where}{place}", str(said), "", said.is_weights, said.note)


def _features(asked: _Pass, plain: _Pass) -> Iterator[tuple[str, Tensor]]:
    """Yield what modules returned first, where that has the shape of an ordinary pass.

    A block that is asked for attention returns it: there it has another shape.
    """
    for name, one in asked.seen.items():
        output = next((part for _, part in tensors(one.output)), None)
        usual = plain.seen.get(name)
        shape = next((part.shape for _, part in tensors(usual and usual.output)), None)
        if output is not None and output.shape == shape:
            yield path_of(name), output


def _lists(
    parts: Sequence[tuple[str, Tensor]],
) -> list[tuple[str, list[tuple[str, Tensor]]]]:
    """Group tensors by the list that holds them."""
    lists: dict[str, list[tuple[str, Tensor]]] = {}
    for path, part in parts:
        lists.setdefault(re.sub(r"\[\d+\]$", "", path), []).append((path, part))
    return list(lists.items())


def _first(same: Sequence[tuple[str, Said]]) -> str:
    return same[0][0].rpartition("[")[2].rstrip("]")


def _final(same: Sequence[tuple[str, Said]]) -> str:
    return same[-1][0].rpartition("[")[2].rstrip("]")


def _change(
    asked: _Pass, plain: _Pass, before: Sequence[Tensor], new: Sequence[tuple[str, Tensor]]
) -> str:
    """Say whether the question changes the features, ``""`` if not."""
    for name, calls in plain.calls.items():
        others = asked.calls.get(name, [])
        for call, other in zip(calls, others, strict=False):
            if not close(other.weights, call.weights):
                return f"changes the features: another attention in {_named(name)}"
    # A block may return the features of its attention instead: another answer, not a change.
    inside = [part for _, part in _features(plain, plain)]
    returned = [part for _, part in tensors(asked.output)]
    for features in before:
        if any(close(part, features) for part in returned):
            continue
        alike = [part for _, part in new if part.shape == features.shape]
        if alike and not any(close(alike[0], other) for other in inside):
            gap = (alike[0].double() - features.double()).abs().max().item()
            return f"changes the features: {gap:.2g} apart"
    return ""


def _named(module: str) -> str:
    return path_of(module) or "the module"


def _merged(found: Sequence[Finding], branches: int) -> list[Finding]:
    """Say once what is the same under each kernel."""
    plain = [replace(finding, kernel="") for finding in found]
    merged: dict[Finding, None] = {}
    for finding, without in zip(found, plain, strict=True):
        merged[without if plain.count(without) == branches else finding] = None
    return list(merged)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    for module in before:
        module.training = False
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def _dropping(layers: Sequence[nn.Dropout]) -> Iterator[None]:
    before = [layer.p for layer in layers]
    for layer in layers:
        layer.p, layer.training = 0.5, True
    try:
        yield
    finally:
        for layer, p in zip(layers, before, strict=True):
            layer.p, layer.training = p, False


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
