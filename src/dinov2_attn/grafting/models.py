"""The methods set on vision transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dinov2_attn.backbone.structure import count_registers
from dinov2_attn.backbone.validation import check_list, count_tokens, layers_to_take, take_batch
from dinov2_attn.errors import NotGrafted
from dinov2_attn.grafting.capture import prepare_recorded
from dinov2_attn.grafting.channel import SWITCH, TAP, attentions_of_pass, unrecorded
from dinov2_attn.grafting.modules import announce, weights_from
from dinov2_attn.kernels.xformers_nesting import can_nest, check_stochastic_depth
from dinov2_attn.math.attention import check_heads
from dinov2_attn.math.selection import place, spell_out
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

    ========  ==================================================================
    x         images ``(B, C, H, W)``, or a list of such batches
    n         ``None``: all blocks; an int: the last ``n``; a sequence: those, in
              the order in which they run (as in ``get_intermediate_layers``)
    masks     ``None`` or boolean ``(B, h·w)``; for a list, one for each tensor
    queries   the rows: ``None`` (all), ``"cls"``, ``"registers"``, ``"patches"``,
              an int, a slice, a sequence of ints
    heads     ``None`` (each) or ``"mean"``
    result    a tuple of ``(B, heads, Q, N)``, or ``(B, Q, N)`` for the mean; for a
              list, a tuple of lists with one tensor for each in ``x``
    ========  ==================================================================

    ``N = 1 + R + h·w``: CLS, registers, patches row by row. Weights are those before
    dropout, in the dtype of the projection. Blocks behind the last one asked for do not
    run, and of that one only norm and projection. A channel-adaptive model sees each
    channel as an image of its own, and so ``B`` is ``B·C``: channel ``c`` of image ``b``
    is number ``b * C + c``. Raises ``InvalidInput`` and
    ``OutOfRange`` for what cannot be, ``NotGrafted`` where a block's class is unknown.
    """
    if SWITCH.on and TAP.recorders:  # no ordinary pass: it may end early
        with unrecorded():
            return get_self_attention(self, x, n, masks, queries=queries, heads=heads)
    queries = spell_out(queries, count_registers(self))
    check_heads(heads)
    blocks = flat_blocks(self.blocks)
    wanted = layers_to_take(n, len(blocks))
    pairs = _checked(self, x, masks, queries)
    running = blocks[: max(wanted, default=-1) + 1]
    if not isinstance(x, list | tuple):
        ((images, mask),) = pairs
        return _walk(running, wanted, self.prepare_tokens_with_masks(images, mask), queries, heads)
    if _nests(self, running, [images for images, _ in pairs]):
        tokens = [self.prepare_tokens_with_masks(images, mask) for images, mask in pairs]
        return _walk(running, wanted, tokens, queries, heads)
    each = [
        get_self_attention(self, images, n, mask, queries=queries, heads=heads)
        for images, mask in pairs
    ]
    return tuple(map(list, zip(*each, strict=True)))


def get_last_self_attention(
    self: Any,
    x: Tensor | list[Tensor],
    masks: Any = None,
    *,
    queries: Queries = None,
    heads: Heads = None,
) -> Any:
    """Return the attention weights of the last block, ``(B, heads, Q, N)``.

    Arguments and errors are those of ``get_self_attention``; a list gives a list. The
    last block's value product, output projection and FFN do not run. DINO v1 calls it
    ``get_last_selfattention``, which is there too.
    """
    return get_self_attention(self, x, 1, masks, queries=queries, heads=heads)[0]


# What is added to the class, by name. DINO v1's spelling is an alias.
METHODS: dict[str, Callable[..., Any]] = {
    "get_self_attention": get_self_attention,
    "get_last_self_attention": get_last_self_attention,
    "get_last_selfattention": get_last_self_attention,
}


def graft_forward_features(original: Forward) -> Forward:
    """Give ``forward_features`` a ``return_attention``: ``"attentions"`` joins the dict.

    The entry is what ``get_self_attention`` returns for all blocks, made in the same pass
    as the features. A list of tensors gives a list of dicts, answered one by one.
    """

    @functools.wraps(original, updated=())
    def forward_features(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.pop("return_attention", False):
            return original(self, *args, **kwargs)
        answers = _answer(original, self, *args, **kwargs)
        if isinstance(answers, list):
            return [{**features, "attentions": attentions} for features, attentions in answers]
        features, attentions = answers
        return {**features, "attentions": attentions}

    return announce(original, forward_features, "return_attention")


def graft_forward(original: Forward) -> Forward:
    """Give ``forward`` a ``return_attention``: ``(output, attentions)`` comes back.

    Attentions are those of ``get_self_attention`` for all blocks; for a list of tensors
    both members hold lists, as they do there.
    """

    @functools.wraps(original, updated=())
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.pop("return_attention", False):
            return original(self, *args, **kwargs)
        # A list passes upstream's head in training only, where nothing is done to it.
        takes_lists = kwargs.get("is_training", False)
        answers = _answer(original, self, *args, takes_lists=takes_lists, **kwargs)
        if isinstance(answers, list):
            outputs, attentions = zip(*answers, strict=True)
            return list(outputs), tuple(map(list, zip(*attentions, strict=True)))
        return answers

    return announce(original, forward, "return_attention")


def graft_prepare_tokens(original: Forward) -> Forward:
    """Let ``prepare_tokens_with_masks`` tell recorders which images a pass begins with."""

    @functools.wraps(original, updated=())
    def prepare_tokens_with_masks(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if SWITCH.on and TAP.recorders:
            return prepare_recorded(original, self, args, kwargs)
        return original(self, *args, **kwargs)

    return prepare_tokens_with_masks


def flat_blocks(blocks: nn.ModuleList) -> list[nn.Module]:
    """Return the blocks of a flat or a chunked model, in order.

    Chunks are lists of blocks, padded in front with ``nn.Identity`` so that indices stay
    those of the whole model.
    """
    flat: list[nn.Module] = []
    for block in blocks:
        chunk = _chunk_in(block)
        flat.extend([block] if chunk is None else flat_blocks(chunk))
    return [block for block in flat if not isinstance(block, nn.Identity)]


def _chunk_in(module: nn.Module) -> nn.ModuleList | None:
    """Return the chunk that ``module`` is, or wraps as its only child (checkpointed, compiled)."""
    while not isinstance(module, nn.ModuleList):
        children = list(module.children())
        if len(children) != 1:
            return None
        module = children[0]
    return module


def _walk(
    blocks: Sequence[nn.Module], wanted: list[int], tokens: Any, queries: Queries, heads: Heads
) -> tuple[Any, ...]:
    weights = []
    for i, block in enumerate(blocks):
        if i in wanted:
            selection = {"queries": queries, "heads": heads}
            weights.append(weights_from(block, "return_attention", tokens, **selection))
        if i < wanted[-1]:
            tokens = block(tokens)
    return tuple(weights)


def _checked(model: Any, x: Any, masks: Any, queries: Queries) -> list[tuple[Any, Any]]:
    """Return images and mask of each batch, refusing what cannot be before anything runs."""
    several = isinstance(x, list | tuple)
    pairs = zip(x, check_list(x, masks), strict=True) if several else [(x, masks)]
    pairs = [take_batch(model, images, mask) for images, mask in pairs]
    for images, _ in pairs:
        place(queries, count_tokens(model, images))
    return pairs


def _nests(model: Any, blocks: Sequence[nn.Module], images: Sequence[Tensor]) -> bool:
    if not can_nest(model, blocks, images):
        return False
    for block in blocks:
        check_stochastic_depth(block, images)
    return True


def _answer(
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
    queries = spell_out(queries, count_registers(model))
    check_heads(heads)
    pairs = _checked(model, x, masks, queries)
    selection = {"queries": queries, "heads": heads}
    if not isinstance(x, list | tuple):
        return _one_pass(original, model, *pairs[0], selection, **kwargs)
    images, masks = map(list, zip(*pairs, strict=True))
    if takes_lists and _nests(model, flat_blocks(model.blocks), images):
        outputs, attentions = _one_pass(original, model, images, masks, selection, **kwargs)
        return list(zip(outputs, zip(*attentions, strict=True), strict=True))
    return [_one_pass(original, model, *pair, selection, **kwargs) for pair in pairs]


def _one_pass(
    original: Forward, model: Any, x: Any, masks: Any, selection: dict[str, Any], **kwargs: Any
) -> tuple[Any, tuple[Any, ...]]:
    """Return upstream's own output and the attention of every block in the same pass."""
    if masks is not None:  # an override may take images only
        kwargs["masks"] = masks
    with attentions_of_pass(**selection) as collected:
        output = original(model, x, **kwargs)
    attentions = collected.all()
    depth = len(flat_blocks(model.blocks))
    if len(attentions) != depth:
        raise NotGrafted(
            f"the attention of {depth} blocks from one forward pass",
            f"that of {len(attentions)}",
            "Call dinov2_attn.install(model) with the live model, and do so before compiling it. "
            "If its forward runs some of the blocks only, use record(model, [0, ...]) with those.",
        )
    return output, attentions
