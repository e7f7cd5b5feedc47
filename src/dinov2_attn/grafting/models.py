"""The methods set on vision transformers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from dinov2_attn._compat import is_compiled, is_traced, is_transformed
from dinov2_attn.backbone.backbone import Backbone
from dinov2_attn.backbone.structure import name_of
from dinov2_attn.errors import IncompatibleUpstreamError, InvalidInputError, NotGraftedError
from dinov2_attn.grafting.asked import attentions_of_pass
from dinov2_attn.grafting.channel import ACTIVE, STATE, recording, unrecorded
from dinov2_attn.grafting.collector import Collector, collect
from dinov2_attn.grafting.modules import extend_signature, runs_itself, weights_from
from dinov2_attn.grafting.tokens import Tokens, named
from dinov2_attn.kernels.xformers import can_nest, check_stochastic_depth
from dinov2_attn.math.attention import check_heads
from dinov2_attn.typing import Forward, Heads, Layers, Queries


def get_self_attention(
    self: Any,
    x: Tensor | list[Tensor],
    n: Layers = None,
    masks: Any = None,
    *,
    queries: Queries = None,
    heads: Heads = None,
) -> tuple[Any, ...]:
    """Return the attention weights of some blocks, one entry for each block.

    Weights are those before dropout, in the dtype of the projection. Tokens are CLS, registers
    and patches row by row: ``N = 1 + R + h·w``. Blocks after the last selected one do not run, and
    of that one only norm and projection. A channel-adaptive model takes each channel as an image
    of its own. So ``B`` is ``B·C``, and channel ``c`` of image ``b`` is number ``b * C + c``.

    Args:
        self: The vision transformer.
        x: Images ``(B, C, H, W)``, or a list of such batches.
        n: The blocks, as in ``get_intermediate_layers``. None for all, an int for the last ``n``,
            a sequence for those, in the order in which they run.
        masks: None or boolean ``(B, h·w)``. For a list of images, one for each tensor.
        queries: The rows. None for all, ``"cls"``, ``"registers"``, ``"patches"``, an int, a
            slice or a sequence of ints.
        heads: None for each head, ``"mean"`` for their mean.

    Returns:
        A tuple of ``(B, heads, Q, N)``, or of ``(B, Q, N)`` for the mean. For a list of images, a
        tuple of lists with one tensor for each.

    Raises:
        InvalidInputError: If an argument is of the wrong kind or shape.
        OutOfRangeError: If there is no such block or token.
        NotGraftedError: If a block is of a class without a graft.

    """
    if ACTIVE.on and STATE.receivers:  # this is no ordinary pass, and may end early
        with unrecorded():
            return get_self_attention(self, x, n, masks, queries=queries, heads=heads)
    backbone = Backbone(self)
    check_heads(heads)
    wanted = backbone.layers(n)
    pairs, queries = _given(backbone, x, masks, queries)
    selection = {"queries": queries, "heads": heads}
    if not wanted:
        return ()
    if runs_itself(self):
        passes = [_own_pass(backbone, wanted, selection, *pair) for pair in pairs]
        return passes[0] if isinstance(x, Tensor) else tuple(map(list, zip(*passes, strict=True)))
    walk = partial(_walk, backbone, wanted, selection)
    if not isinstance(x, list | tuple):
        return walk(backbone.tokens(*pairs[0]))
    tokens = [backbone.tokens(images, mask) for images, mask in pairs]
    if _nests(self, backbone.blocks[: wanted[-1] + 1], [images for images, _ in pairs]):
        return walk(tokens)
    return tuple(map(list, zip(*map(walk, tokens), strict=True)))


def get_last_self_attention(
    self: Any,
    x: Tensor | list[Tensor],
    masks: Any = None,
    *,
    queries: Queries = None,
    heads: Heads = None,
) -> Any:
    """Return the attention weights of the last block, ``(B, heads, Q, N)``.

    Arguments and errors are those of ``get_self_attention``. A list gives a list. Value product,
    output projection and FFN of the last block do not run. ``get_last_selfattention`` is the name
    of this method in DINO v1.
    """
    return get_self_attention(self, x, 1, masks, queries=queries, heads=heads)[0]


# The methods that are added to a class, by name. DINO v1's spelling is an alias.
METHODS: dict[str, Callable[..., Any]] = {
    "get_self_attention": get_self_attention,
    "get_last_self_attention": get_last_self_attention,
    "get_last_selfattention": get_last_self_attention,
}


def graft_forward_features(original: Forward) -> Forward:
    """Give ``forward_features`` a ``return_attention``, which adds ``"attentions"`` to the dict.

    The entry is what ``get_self_attention`` returns for all blocks, from the same pass as the
    features. A list of tensors gives a list of dicts.
    """

    @functools.wraps(original, updated=())
    def forward_features(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.pop("return_attention", False):
            return original(self, *args, **kwargs)
        answers = _output_and_attentions(original, self, *args, **kwargs)
        if isinstance(answers, list):
            return [{**features, "attentions": attentions} for features, attentions in answers]
        features, attentions = answers
        if not isinstance(features, Mapping):
            raise IncompatibleUpstreamError(
                "forward_features to return a dict, which the attentions are added to",
                f"{type(features).__name__}",
                "Call model(x, return_attention=True) or model.get_self_attention(x).",
            )
        return {**features, "attentions": attentions}

    return extend_signature(original, forward_features, "return_attention")


def graft_forward(original: Forward) -> Forward:
    """Give ``forward`` a ``return_attention``, which returns ``(output, attentions)``.

    Attentions are those of ``get_self_attention`` for all blocks. For a list of tensors both are
    lists, as they are there. ``torch.autograd.grad(output.sum(), attentions)`` is that of explicit
    attention if all rows and each head were asked for, in eager mode.
    """

    @functools.wraps(original, updated=())
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.pop("return_attention", False):
            return original(self, *args, **kwargs)
        # Upstream's head takes a list in training only, where it returns it unchanged.
        takes_lists = kwargs.get("is_training", False)
        answers = _output_and_attentions(original, self, *args, takes_lists=takes_lists, **kwargs)
        if isinstance(answers, list):
            outputs, attentions = zip(*answers, strict=True)
            return list(outputs), tuple(map(list, zip(*attentions, strict=True)))
        return answers

    return extend_signature(original, forward, "return_attention")


def _given(
    backbone: Backbone, x: Any, masks: Any, queries: Queries
) -> tuple[list[tuple[Any, Any]], Queries]:
    """Return the images and mask of each batch, and ``queries`` as positions.

    A model that runs its own pass may have other tokens than upstream's. They are measured.
    """
    if not runs_itself(backbone.model) or is_transformed() or is_traced():
        queries = backbone.resolve_names(queries)
        return backbone.batches(x, masks, queries), queries
    pairs = backbone.batches(x, masks)
    if not isinstance(queries, str) or queries == "cls":
        return pairs, backbone.resolve_names(queries)
    attention = next(iter(backbone.attentions()))
    layout = Tokens(backbone.model, backbone, attention, None, pairs[0][0]).probed()
    if layout is None:
        raise InvalidInputError(
            f"queries={queries!r} of a model whose token layout can be measured",
            f"{name_of(type(backbone.model))}, in which no patch grid was found",
            "Pass positions: an int, a slice or a sequence of ints.",
        )
    return pairs, named(queries, layout)


def _own_pass(
    backbone: Backbone, wanted: list[int], selection: dict[str, Any], images: Tensor, masks: Any
) -> tuple[Any, ...]:
    """Return the weights of the blocks ``wanted`` from the model's own pass, ended after them."""
    model, given = backbone.model, {} if masks is None else {"masks": masks}
    run = partial(getattr(model, "forward_features", model), images, **given)
    if must_ask(backbone):
        with attentions_of_pass(**selection) as asked:
            run()
        every = _of_tensors(asked.all())
        _check_count(every, backbone.depth)
        return tuple(every[i] for i in wanted)
    attentions = {m: i for m, i in backbone.attentions().items() if i in wanted}
    found = collect(run, attentions, len(wanted), **selection)
    _check_count(found, len(wanted))
    return tuple(found)


def _walk(
    backbone: Backbone, wanted: list[int], selection: dict[str, Any], tokens: Any
) -> tuple[Any, ...]:
    """Return the weights of the blocks ``wanted``. Blocks after the last of these do not run.

    The last one is asked, because of it only norm and projection have to run. The weights of the
    others are those of their own kernel calls.
    """
    asked = asked_layers(backbone, wanted)
    others = [i for i in wanted if i not in asked]
    if not others:
        return tuple(
            weights_from(block, given, **selection)
            for i, block, given in backbone.walk(tokens, wanted[-1] + 1)
            if i in wanted
        )
    modules = {m: i for m, i in backbone.attentions().items() if i in others}
    collector = Collector(modules, **selection)
    with recording(collector, modules):
        for _, block, given in backbone.walk(tokens, wanted[-1] + 1):
            tokens, final = given, block
    _check_count(collector.weights, len(others))
    return (*collector.weights, weights_from(final, tokens, **selection))


def asked_layers(backbone: Backbone, wanted: list[int]) -> list[int]:
    """Return those of the blocks ``wanted`` whose weights come from their projection."""
    if runs_itself(backbone.model):
        return []
    if len(wanted) < 2 or must_ask(backbone):
        return wanted
    return wanted[-1:]


def must_ask(backbone: Backbone) -> bool:
    """Return whether the weights of a pass have to be asked for, block by block.

    An attention module that stands in several blocks is asked in each of them.
    """
    if is_transformed() or is_traced() or backbone.shares_attention:
        return True
    # Of all modules, because a wrapper of a block may not hand on its attributes.
    return any(
        is_compiled(module) or (module.training and getattr(module, "sample_drop_ratio", 0))
        for module in backbone.model.modules()
    )


def is_grafted(model: object) -> bool:
    """Return whether ``model`` has the ``get_self_attention`` of this package.

    ``torch.compile`` hands it on, FSDP2 wraps it, and a subclass may override it.
    """
    method = getattr(model, "get_self_attention", None)
    if method is None:
        return False
    if getattr(inspect.unwrap(method), "__func__", None) is get_self_attention:
        return True
    return any(
        vars(cls).get("get_self_attention") is get_self_attention for cls in type(model).__mro__
    )


def _nests(model: Any, blocks: Sequence[nn.Module], images: Sequence[Tensor]) -> bool:
    if not can_nest(model, blocks, images):
        return False
    for block in blocks:
        check_stochastic_depth(block, images)
    return True


def _output_and_attentions(
    original: Forward,
    model: Any,
    x: Any = None,
    masks: Any = None,
    *,
    queries: Queries = None,
    heads: Heads = None,
    takes_lists: bool = True,
    **kwargs: Any,
) -> Any:
    """Return ``(output, attentions)`` of one pass; for a list of tensors a list of these."""
    backbone = Backbone(model)
    check_heads(heads)
    pairs, queries = _given(backbone, x, masks, queries)
    selection = {"queries": queries, "heads": heads}
    if not isinstance(x, list | tuple):
        return _one_pass(original, model, *pairs[0], selection, **kwargs)
    images, masks = map(list, zip(*pairs, strict=True))
    together = backbone.takes_lists or _nests(model, backbone.blocks, images)
    if takes_lists and together:
        outputs, attentions = _one_pass(original, model, images, masks, selection, **kwargs)
        return list(zip(outputs, zip(*attentions, strict=True), strict=True))
    return [_one_pass(original, model, *pair, selection, **kwargs) for pair in pairs]


def _one_pass(
    original: Forward, model: Any, x: Any, masks: Any, selection: dict[str, Any], **kwargs: Any
) -> tuple[Any, tuple[Any, ...]]:
    """Return upstream's own output and the attention of every block in the same pass.

    For a list of tensors that runs together, the attention of a block is a list too.
    """
    if masks is not None:  # an override may take images only
        kwargs["masks"] = masks
    backbone = Backbone(model)
    if must_ask(backbone):
        with attentions_of_pass(**selection) as asked:
            output = original(model, x, **kwargs)
        attentions = asked.all() if isinstance(x, list) else _of_tensors(asked.all())
    else:
        modules = backbone.attentions()
        collector = Collector(modules, links=True, **selection)
        with recording(collector, modules):
            output = original(model, x, **kwargs)
        attentions = tuple(collector.weights)
        if isinstance(x, list) and backbone.takes_lists:  # a kernel call for each of its tensors
            _check_count(attentions, backbone.depth * len(x))
            attentions = _in_lists(attentions, len(x))
    _check_count(attentions, backbone.depth)
    return output, attentions


def _of_tensors(attentions: Sequence[Any]) -> tuple[Any, ...]:
    """Return the weights for a tensor that a model may have run as a list of one."""
    return tuple(a[0] if isinstance(a, list) and len(a) == 1 else a for a in attentions)


def _in_lists(attentions: Sequence[Any], length: int) -> tuple[Any, ...]:
    starts = range(0, len(attentions), length)
    return tuple(list(attentions[start : start + length]) for start in starts)


def _check_count(attentions: Sequence[Any], blocks: int) -> None:
    if len(attentions) == blocks:
        return
    raise NotGraftedError(
        f"the attention of {blocks} blocks from one forward pass",
        f"that of {len(attentions)}",
        "Call dinov2_attn.install(model) with the live model, and do so before compiling it. "
        "record(model) gives those of each attention module; if its forward runs some of the "
        "blocks only, use record(model, [0, ...]) with those.",
    )
