"""Which patches made a target, by the attention weights and the gradients by them.

The published codes make explicit matrices of all layers. Here the kernel stays fused. A row of a
product of matrices is a vector that goes through the layers from the last to the first, in tiles of
rows, as in rollout.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args, overload

import torch
from torch import Tensor, nn

from dinov2_attn.backbone.layout import Layout
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.grafting.tokens import named
from dinov2_attn.maps.calls import keep_calls
from dinov2_attn.maps.each_layer import gradients_of_each_layer
from dinov2_attn.maps.graded import Graded, GradedCalls, check_parameters
from dinov2_attn.maps.layers import recorded_in
from dinov2_attn.maps.one_batch import batches_of, run_model
from dinov2_attn.maps.result import W
from dinov2_attn.maps.rollout import Rollout, check_ratio, starting
from dinov2_attn.maps.targets import Pass, Target, in_words, score, watching_norm
from dinov2_attn.maps.tiles import without_lowest
from dinov2_attn.math.attention import without_autocast
from dinov2_attn.math.selection import positions
from dinov2_attn.typing import Images, Masks, Model, Queries, RecordedLayers

Method = Literal["chefer", "gradient_rollout", "attention_gradient", "legrad"]


@dataclass(frozen=True, eq=False, repr=False)
class Relevance(Rollout[W]):
    """How much each token did for a target.

    Attributes:
        weights: ``(B, Q, N)``, float32 at least, never negative. Columns are CLS, registers,
            patches row by row. They do not sum to one.
        method: The method.
        target: What is explained, in words: once, or once for each image.

    Grid, prefix, queries and the others are those of ``Rollout``. ``queries`` is None for legrad,
    whose one row is the mean of all.

    """

    _LAYOUT: ClassVar[tuple[str, ...]] = (*Rollout._LAYOUT, "method", "target")

    method: Method = "chefer"
    target: tuple[str, ...] = ()

    def _facts(self) -> dict[str, str]:
        target = {"target": ", ".join(self.target)} if self.target else {}
        return {"method": self.method, **target, **super()._facts()}


@overload
def relevance(
    model: Model,
    images: Tensor,
    target: Target,
    method: Method = "chefer",
    layers: RecordedLayers = None,
    *,
    queries: Queries = "cls",
    discard_ratio: float = 0.0,
    masks: Tensor | None = None,
) -> Relevance: ...
@overload
def relevance(
    model: Model,
    images: Sequence[Tensor],
    target: Target,
    method: Method = "chefer",
    layers: RecordedLayers = None,
    *,
    queries: Queries = "cls",
    discard_ratio: float = 0.0,
    masks: Sequence[Tensor | None] | None = None,
) -> list[Relevance]: ...


def relevance(
    model: Any,
    images: Images,
    target: Target,
    method: Method = "chefer",
    layers: RecordedLayers = None,
    *,
    queries: Queries = "cls",
    discard_ratio: float = 0.0,
    masks: Masks = None,
) -> Relevance | list[Relevance]:
    """Return how much each token did for a target, by attention and its gradients.

    >>> found = relevance(classifier, images, 281)
    >>> found.patch_maps()  # (B, 1, h, w)

    One forward and one backward pass run, with the model's own kernels. Beyond them memory is
    O(N · C) for each layer, and no matrix exists but those that explicit code makes. Parameters get
    no gradients. Images of a batch do not affect each other where the model keeps them apart. A is
    the matrix of a layer, ∇A the gradient of the target by it, and E_h the mean over heads::

        "chefer"              R = identity; for each layer: R = R + E_h((∇A ∘ A)⁺) @ R
        "gradient_rollout"    M = E_h(∇A ∘ A)⁺ + identity; R = (M / M.sum(-1, keepdim=True)) @ R
        "attention_gradient"  the mean of E_h((∇A ∘ A)⁺) over layers, by default the last one
        "legrad"              the mean of E_h(∇A⁺) over layers and rows, where the target of each
                              layer is made of its own tokens

    For ``"legrad"`` the tokens behind each layer take the place of those behind the last one, so
    there is one more forward pass for each layer.

    Args:
        model: A module whose forward takes images as its first argument.
        images: ``(B, C, H, W)``, or a list of such batches.
        target: What is explained: a function of the output that returns one number for each image;
            the number of a class, or one for each image; a floating-point tensor ``(C,)`` or
            ``(B, C)``, such as the embedding of a text, to which the output is compared by its
            cosine; or ``token_similarity((2, 5))``.
        method: One of those above.
        layers: The layers to use, as in ``attention_maps``.
        queries: The tokens whose rows are returned. ``"legrad"`` has one row, the mean of all.
        discard_ratio: Of ``"gradient_rollout"``: the share of the lowest elements of each layer
            that become zero. vit-explain discards 0.9 of them. The matrix of one layer and one
            image exists then.
        masks: ``None`` or boolean ``(B, h·w)``; for a list, one for each batch.

    Returns:
        The relevance of the batch; for a list of batches, a list.

    Raises:
        InvalidInputError: An argument is of the wrong kind or shape, or the target does not depend
            on the output.
        OutOfRangeError: There is no such layer, query or class.
        NotRecordedError: A layer did not run, or not once, or the target does not depend on it.

    Sources:
        - chefer: Chefer, Gur, Wolf, *Generic Attention-model Explainability*, 2021, equations 5
          and 6 (hila-chefer/Transformer-MM-Explainability, commit 58eaea8).
        - attention_gradient: equation 5 there.
        - gradient_rollout: Gildenblat, jacobgil/vit-explain, ``vit_grad_rollout.py``, commit
          15a81d3. That code divides column ``j`` by the sum of row ``j``; here each row is divided
          by its own sum.
        - legrad: Bousselham et al., *LeGrad*, 2024 (WalBouss/LeGrad, commit a9edb03), before its
          rescaling to 0 … 1.

    """
    _check(method, discard_ratio, queries)
    if method == "attention_gradient" and layers is None:
        layers = 1
    explain = partial(_one, model, target, method, layers, queries, float(discard_ratio))
    found = [explain(*pair) for pair in batches_of(model, images, masks)]
    return found if isinstance(images, list | tuple) else found[0]


def _check(method: object, discard_ratio: object, queries: object) -> None:
    if method not in get_args(Method):
        raise InvalidInputError(
            f"method to be one of {', '.join(map(repr, get_args(Method)))}",
            repr(method),
            'Leave it out for "chefer".',
        )
    if check_ratio(discard_ratio) and method != "gradient_rollout":
        raise InvalidInputError(
            'discard_ratio of method="gradient_rollout"',
            f"that of {method!r}",
            "Leave it out, or take the rollout.",
        )
    if method == "legrad" and queries != "cls":
        raise InvalidInputError(
            'no queries for method="legrad", whose row is the mean of all',
            f"queries={queries!r}",
            "Leave queries out.",
        )


def _one(
    model: nn.Module,
    target: Target,
    method: Method,
    layers: RecordedLayers,
    queries: Queries,
    ratio: float,
    images: Tensor,
    masks: Any,
) -> Relevance:
    """Return the relevance of one batch."""
    calls = GradedCalls(recorded_in(model, layers), whole=True)
    check_parameters(model)
    # Parameters may be frozen, and autograd off: then the images alone have a gradient.
    with torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        run = partial(run_model, model, images, masks)
        if method == "legrad":
            layout, graded = gradients_of_each_layer(calls, model, layers, run, images, target)
        else:
            layout, graded = _gradients(calls, model, layers, run, images, target)
    with torch.no_grad(), without_autocast(images.device):
        rows = None if method == "legrad" else positions(named(queries, layout), layout.length)
        every = torch.arange(layout.length, device=images.device)
        weights = _METHODS[method](graded, every, rows or (), ratio)
    place = (layout.suffix, layout.per_cell, layout.planes)
    words = in_words(target, layout)
    return Relevance(weights, layout.grid, layout.prefix, rows, *place, method=method, target=words)


def _gradients(
    calls: GradedCalls,
    model: nn.Module,
    layers: RecordedLayers,
    run: Callable[[], Any],
    images: Tensor,
    target: Target,
) -> tuple[Layout, list[Graded]]:
    """Return the layout of the tokens, and the calls and gradients of one target."""
    normed: list[Tensor] = []
    outputs: list[Any] = []
    with watching_norm(calls.modules, normed):
        keep_calls(calls, model, layers, lambda: outputs.append(run()))
    layout = calls.layout(images)
    total = score(target, Pass(layout, outputs[0], normed), len(images))
    count = len(calls.found)
    calls.differentiate(total, [images], range(count))
    return layout, [calls.take_graded(number) for number in range(count)]


def _chefer(graded: list[Graded], every: Tensor, rows: Sequence[int], _: float) -> Tensor:
    start, shares = starting(every, rows, whole=False)
    shares = _begin(shares, graded)
    for number, one in enumerate(reversed(graded)):
        own = one if number else one.at(list(rows))
        through = _positive(own, shares, start)
        shares = through.index_add_(2, start, shares)
        start = every
    return shares


def _attention_gradient(
    graded: list[Graded], every: Tensor, rows: Sequence[int], _: float
) -> Tensor:
    start, shares = starting(every, rows, whole=False)
    shares = _begin(shares, graded)
    found = [_positive(one.at(list(rows)), shares, start) for one in graded]
    return torch.stack(found).mean(0)


def _positive(graded: Graded, shares: Tensor, positions: Tensor) -> Tensor:
    """Return ``shares (B, S, L) @ E_h((∇A ∘ A)⁺)``, ``(B, S, N)``, head by head."""
    result = shares.new_zeros((*shares.shape[:2], graded.call.columns))
    for sample, (out, own) in enumerate(zip(result, shares, strict=True)):
        for lines, weights, gradients in graded.tiles(sample, positions, 1):
            part = (weights * gradients).clamp_(min=0)[0]
            out.addmm_(own[:, lines], part, alpha=1 / graded.call.heads)
    return result


def _gradient_rollout(
    graded: list[Graded], every: Tensor, rows: Sequence[int], ratio: float
) -> Tensor:
    start, shares = starting(every, rows, whole=ratio > 0)
    shares = _begin(shares, graded)
    for number, one in enumerate(reversed(graded)):
        own = one if number or ratio else one.at(list(rows))
        shares, start = _rolled(own, shares, start, ratio), every
    return shares


def _rolled(graded: Graded, shares: Tensor, positions: Tensor, ratio: float) -> Tensor:
    """Return ``shares @ (M / M.sum(-1))``, where ``M = E_h(∇A ∘ A)⁺ + identity``."""
    result = shares.new_zeros((*shares.shape[:2], graded.call.columns))
    for sample, (out, own) in enumerate(zip(result, shares, strict=True)):
        tiles = graded.tiles(sample, positions, graded.call.heads)
        fused = ((t.lines, (t.weights * t.gradients).mean(0).clamp_(min=0)) for t in tiles)
        if ratio:
            whole = torch.cat([part for _, part in fused])
            parts = [(slice(None), without_lowest(whole, ratio, keep_first=False))]
        else:
            parts = fused  # type: ignore[assignment]
        for lines, part in parts:
            some = own[:, lines] / (1 + part.sum(-1))
            out.addmm_(some, part)
            out.index_add_(1, positions[lines], some)
    return result


def _legrad(graded: list[Graded], every: Tensor, _: Sequence[int], __: float) -> Tensor:
    """Return the mean of ``E_h(∇A⁺)`` over layers and rows, ``(B, 1, N)``."""
    shares = _begin(torch.ones(1, len(every), device=every.device), graded)
    result = torch.zeros_like(shares)
    for one in graded:
        for sample, out in enumerate(result):
            for lines, _weights, gradients in one.tiles(sample, every, 1):
                part = gradients.clamp(min=0)[0]
                scale = 1 / one.call.heads / len(graded) / len(every)
                out.addmm_(shares[sample][:, lines], part, alpha=scale)
    return result


def _begin(shares: Tensor, graded: list[Graded]) -> Tensor:
    """Return ``shares (S, L)`` for each sample, in the dtype of the calls."""
    call = graded[-1].call
    return shares.to(torch.promote_types(call.dtype, torch.float32)).expand(call.batch, -1, -1)


_METHODS: dict[Method, Callable[[list[Graded], Tensor, Sequence[int], float], Tensor]] = {
    "chefer": _chefer,
    "gradient_rollout": _gradient_rollout,
    "attention_gradient": _attention_gradient,
    "legrad": _legrad,
}
