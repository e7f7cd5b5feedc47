"""Recording ordinary forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor, nn

from dinov2_attn._compat import raised_by_dynamo
from dinov2_attn.errors import InvalidInputError, NotRecordedError
from dinov2_attn.grafting.channel import editing, in_a_graph, recording, unrecorded
from dinov2_attn.kernels.capture import StopPassError
from dinov2_attn.maps.copies import checked_device
from dinov2_attn.maps.facets import check_facets
from dinov2_attn.maps.from_weights import FromWeights
from dinov2_attn.maps.layers import recorded_in
from dinov2_attn.maps.measuring import check_statistics
from dinov2_attn.maps.recorder import Asked, Check, Recorder, Reduce
from dinov2_attn.maps.recording import Recording
from dinov2_attn.maps.result import W
from dinov2_attn.typing import Facet, Grid, Heads, Model, Queries, RecordedLayers, Statistic

FeaturesFrom = Literal["from_kernel", "from_weights"]


@overload
def record(
    model: Model,
    layers: RecordedLayers = None,
    *,
    queries: Queries = None,
    heads: Heads = None,
    reduce: None = None,
    gradients: bool = False,
    facets: Sequence[Facet] | Facet = (),
    statistics: Sequence[Statistic] | Statistic = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    features: FeaturesFrom = "from_kernel",
    check: Check = "first",
    grid: Grid | None = None,
    prefix: int | None = None,
) -> AbstractContextManager[Recording[Tensor]]: ...
@overload
def record(
    model: Model,
    layers: RecordedLayers = None,
    *,
    queries: Queries = None,
    heads: Heads = None,
    reduce: Reduce[W],
    gradients: bool = False,
    facets: Sequence[Facet] | Facet = (),
    statistics: Sequence[Statistic] | Statistic = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    features: FeaturesFrom = "from_kernel",
    check: Check = "first",
    grid: Grid | None = None,
    prefix: int | None = None,
) -> AbstractContextManager[Recording[W]]: ...


@contextmanager
def record(
    model: Model,
    layers: RecordedLayers = None,
    *,
    queries: Queries = None,
    heads: Heads = None,
    reduce: Reduce[Any] | None = None,
    gradients: bool = False,
    facets: Sequence[Facet] | Facet = (),
    statistics: Sequence[Statistic] | Statistic = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    features: FeaturesFrom = "from_kernel",
    check: Check = "first",
    grid: Grid | None = None,
    prefix: int | None = None,
) -> Iterator[Recording[Any]]:
    """Record the attention of every ordinary forward pass inside a ``with`` block.

    >>> with record(model, queries="cls") as maps:
    ...     depth = model(images)
    >>> maps.weights, maps.grid, maps.prefix

    Any model will do, without ``install``. The weights are those of the queries, keys, scale and
    mask that each attention module gives to its kernel in this pass, or the softmax that explicit
    code multiplies with the values. Features are bit for bit those of an unrecorded pass, unless
    ``features="from_weights"`` says otherwise.

    In training with stochastic depth the weights are those of the samples that upstream kept.
    With grad on they are part of the graph and keep it alive. Under reentrant checkpointing they
    are not.

    With ``gradients=True`` the weights are outside of the graph. A backward pass from the output
    fills ``maps.gradients`` beside ``maps.weights``, inside the block or after it:

    >>> with record(model, gradients=True, queries="cls") as maps:
    ...     logits = model(images)
    >>> logits[:, 3].sum().backward()
    >>> maps.weights[-1] * maps.gradients[-1]

    They are the gradients by the weights before dropout, as if explicit code had made them. Each
    backward pass replaces those of the one before.

    Recordings may be nested, of the same model or another. Where code makes its own weights, and
    with ``features="from_weights"``, they share tensors: clone what you write into. A question
    inside the block (``get_self_attention``, ``return_attn``) is answered and not recorded. A pass
    with ``return_attention=True`` is recorded like any other. Other threads, and so the replicas
    of ``DataParallel``, are not recorded. A task of asyncio records its own passes and those of
    tasks that it makes inside the block. A generator shares the context of its caller: while it is
    suspended inside the block, passes of the caller are recorded.

    Args:
        model: Any module with attention inside.
        layers: None for all, an int for the last so many, or a sequence of layers. The blocks of a
            DINOv2 have numbers, also where it is the only attention of a larger model. In any other
            model layers are the paths of attention modules, such as
            ``"encoder.layer.3.attention"``, and a number is a place in their order. Where a model
            has one DINOv2 and other attention, numbers are those of the DINOv2's blocks, and None
            records all of it by paths.
        queries: The tokens whose rows are wanted, as in ``attention_maps``.
        heads: None for each head, ``"mean"`` for their mean.
        reduce: ``reduce(layer, weights)`` is kept in place of the weights of one batch. It is
            called when the kernel of the layer has run, so that a full matrix need not outlive
            it: all layers take the memory of one. Weights, or a view of them, that something
            refers to are kept. Other memory is reused by the next layer. Gradients go through
            it as well, in the backward pass.
        gradients: Whether to keep the gradients by the weights of each backward pass.
        facets: Which of ``"query"``, ``"key"`` and ``"value"`` to keep, as the kernel was given
            them: behind norms and rotation, in its dtype, for all tokens. They do not go through
            ``reduce``.
        statistics: Which of ``"entropy"``, ``"distance"``, ``"received"``, ``"prefix_mass"``,
            ``"spread"`` and ``"centroid"`` to measure, of all rows whatever ``queries`` is. They
            are in ``maps.statistics``, as ``statistics`` returns them, outside of autograd's
            graph. No matrix is needed for them: say ``queries="cls"`` or ``queries=[]``.
        dtype: The floating dtype in which weights are kept, by default that of the kernel. They
            are computed as ever. ``torch.float16`` and ``torch.bfloat16`` take half of the memory
            of ``float32``. Gradients and facets keep their dtype.
        device: The device on which weights, what ``reduce`` returns, gradients, facets and
            statistics are kept, by default that of the kernel. From CUDA to ``"cpu"`` they are
            copied to pinned memory while the next layers run. The GPU then holds the results of
            about three layers.
        features: ``"from_weights"`` lets the pass go on from ``weights @ values``, so that the
            kernel does not run beside. On a CPU full matrices of every layer cost less then.
            Features are those of the kernel within its tolerance, not bit for bit. A layer's first
            pass runs both, for its proof. Kernels with dropout raise.
        check: When to prove that ``weights @ values`` is what the kernel returned, on a few rows
            of each layer: in its ``"first"`` pass, in ``"every"`` pass, or never (``False``).
            The first pass proves rows of every head, later ones those of a head drawn at random.
        grid: Height and width of the patch grid, where it is known better.
        prefix: The number of tokens before the patches, where it is known better.

    Yields:
        The ``Recording``, a sequence of ``AttentionMaps``: one for each batch of a pass, and for
        each kind of attention in it (frames and all tokens, for instance).

    Raises:
        InvalidInputError: If ``model`` has no attention inside, or an argument does not fit.
        OutOfRangeError: If there is no such layer or query.
        UnfaithfulError: If weights are not those of the kernel.
        NotRecordedError: At the end of the block, if no pass was recorded or one lacks layers
            (an exported model, an exception caught inside). In the block, if an attention module
            calls no kernel that can be seen, or several, or if ``torch.compile``,
            ``torch.export`` or ``torch.func`` would make another function of a pass.

    """
    modules = recorded_in(model, layers, every=True)
    asked = Asked(
        queries,
        heads,
        reduce,
        gradients,
        check_facets(facets),
        check_statistics(statistics),
        dtype,
        checked_device(device),
        check,
        grid,
        prefix,
    )
    recorder = Recorder(modules, asked)
    attentions = [*modules.wanted, *modules.others]
    source: AbstractContextManager[object] = nullcontext()
    if _are_from_weights(features):
        source = editing(FromWeights(modules.wanted, bool(check)), modules.wanted)
    try:
        with source, recording(recorder, attentions, modules.entrances, [modules.whole]):
            yield recorder.recording
    except Exception as error:
        # Dynamo wraps what is raised while it traces, and keeps only the words.
        if raised_by_dynamo(error) and NotRecordedError.__name__ in str(error):
            raise in_a_graph() from error
        raise
    recorder.check()


def record_one(
    model: nn.Module,
    layers: RecordedLayers,
    run: Callable[[], object],
    *,
    queries: Queries = None,
    heads: Heads = None,
    statistics: Sequence[Statistic] = (),
) -> Recording[Tensor]:
    """Return the recording of one pass, which ends with the last of ``layers`` where it may.

    The first pass of a model that only contains a DINOv2, or none, runs to its end. It shows
    whether the layers run once in a pass with images of this size.

    Args:
        model: Any module with attention inside.
        layers: As for ``record``.
        run: Runs ``model``.
        queries: The tokens whose rows are wanted.
        heads: None for each head, ``"mean"`` for their mean.
        statistics: The statistics to measure.

    Raises:
        NotRecordedError: If the pass lacks layers.

    """
    modules = recorded_in(model, layers)
    asked = Asked(queries, heads, statistics=tuple(statistics))
    recorder = Recorder(modules, asked, may_stop=modules.is_chosen)
    attentions = [*modules.wanted, *modules.others]
    with (
        unrecorded(),
        recording(recorder, attentions, modules.entrances, [modules.whole]),
        # A pass that ends early may not come to the line that switches grad mode on again.
        torch.set_grad_enabled(torch.is_grad_enabled()),
        suppress(StopPassError),
    ):
        run()
    recorder.check()
    recorder.note_ran_once()
    return recorder.recording


def _are_from_weights(features: object) -> bool:
    """Return whether ``features`` are to be made of the recorded weights."""
    if features in get_args(FeaturesFrom):
        return features == "from_weights"
    raise InvalidInputError(
        'features="from_kernel" or features="from_weights"',
        f"features={features!r}",
        "Leave it out for features that are bit for bit those of an unrecorded pass.",
    )
