"""What a vision transformer of this family is: its blocks, its tokens, its patch grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from dinov2_attn._compat import submodules
from dinov2_attn.backbone.attentions import attention_modules
from dinov2_attn.backbone.contract import name_of
from dinov2_attn.backbone.structure import Role, role_of_module
from dinov2_attn.backbone.validation import check_batch, check_list, layers_to_take
from dinov2_attn.errors import InvalidInputError, NotGraftedError
from dinov2_attn.math.selection import resolve_names, to_index
from dinov2_attn.typing import Grid, Layers, Queries

# The name under which a graft notes the keyword that it adds.
MARK = "_dinov2_attn_keyword"


class Backbone:
    """A vision transformer: its blocks, and how images become its tokens.

    Tokens are CLS, the registers, and the patches row by row: ``N = prefix + h · w``.

    Attributes:
        model: The vision transformer itself.
        blocks: Its blocks in the order in which they run, chunked or not.

    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks = flat_blocks(model.blocks)

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    @property
    def registers(self) -> int:
        """The number of register tokens, which the first revisions of upstream do not have."""
        names = ("num_register_tokens", "n_storage_tokens")  # upstream's, DINOv3's
        return int(next((getattr(self.model, n) for n in names if hasattr(self.model, n)), 0))

    @property
    def prefix(self) -> int:
        """The number of tokens in front of the patches: CLS and the registers."""
        return 1 + self.registers

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        size = self.model.patch_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def channels(self) -> int:
        """The number of channels of its images."""
        return int(self.model.patch_embed.in_chans)

    @property
    def takes_lists(self) -> bool:
        """Whether its blocks run lists by themselves, each tensor with a kernel call of its own.

        DINOv3's do, and what a tensor becomes can depend on its place in the list.
        """
        is_one = hasattr(self.model, "forward_features_list")
        return is_one and all(hasattr(module, "forward_list") for module in self.attentions())

    @property
    def is_channel_adaptive(self) -> bool:
        """Whether it takes any number of channels, and runs each as an image of its own."""
        # Upstream's name for it. With three channels it could run nothing of the kind.
        return bool(getattr(self.model, "bag_of_channels", False)) and self.channels == 1

    def grid(self, images: Tensor) -> Grid:
        """Return the patch grid ``(h, w)`` of images ``(…, H, W)``."""
        height, width = self.patch_size
        return images.shape[-2] // height, images.shape[-1] // width

    def length(self, images: Tensor) -> int:
        """Return the number of tokens N of an image."""
        height, width = self.grid(images)
        return self.prefix + height * width

    def layers(self, chosen: Layers) -> list[int]:
        """Return the numbers of the blocks that ``chosen`` names, in ascending order."""
        return layers_to_take(chosen, self.depth)

    def resolve_names(self, queries: Queries) -> Queries:
        """Return ``queries`` with the words ``"registers"`` and ``"patches"`` as positions."""
        return resolve_names(queries, self.registers)

    def batches(self, images: Any, masks: Any, queries: Queries = None) -> list[tuple[Any, Any]]:
        """Return the images and the mask of each batch as the model runs them.

        A tensor is one batch, a list is several. A channel-adaptive model gets each channel as
        an image of its own, ``(B·C, 1, H, W)``, as from its ``get_intermediate_layers``: channel
        ``c`` of image ``b`` is number ``b * C + c``, and has the mask of its image.

        Raises:
            InvalidInputError: if the model cannot take them.
            OutOfRangeError: if there is no token for one of ``queries``.

        """
        several = isinstance(images, list | tuple)
        given = (
            zip(images, check_list(images, masks), strict=True) if several else [(images, masks)]
        )
        pairs = [self._batch(batch, mask) for batch, mask in given]
        for batch, _ in pairs:
            to_index(queries, self.length(batch))
        return pairs

    def tokens(self, images: Any, masks: Any = None) -> Any:
        """Return the tokens ``(B, N, C)`` that the first block is given."""
        return self.model.prepare_tokens_with_masks(images, masks)

    def walk(self, tokens: Any, stop: int | None = None) -> Iterator[tuple[int, nn.Module, Any]]:
        """Yield the number, the block and its input for the blocks before ``stop``.

        A block runs when the next one is asked for, and the last one does not run.
        """
        stop = self.depth if stop is None else stop
        for i, block in enumerate(self.blocks[:stop]):
            yield i, block, tokens
            if i + 1 < stop:
                tokens = block(tokens)

    def attentions(self) -> dict[nn.Module, int]:
        """Return the attention modules of all blocks, with the numbers of their blocks.

        One that stands in several blocks has the number of the last of them.
        """
        return dict(self._attentions())

    @property
    def shares_attention(self) -> bool:
        """Whether an attention module stands in several blocks."""
        return len(self.attentions()) < len(self._attentions())

    def _attentions(self) -> list[tuple[nn.Module, int]]:
        return [
            (module, layer)
            for layer, block in enumerate(self.blocks)
            for module in attention_modules(block).values()
        ]

    def _batch(self, images: Any, masks: Any) -> tuple[Any, Any]:
        groups = check_batch(self, images, masks)
        if groups == 1:
            return images, masks
        masks = None if masks is None else masks.repeat_interleave(groups, 0)
        return images.flatten(0, 1)[:, None], masks


def transformers_in(model: nn.Module) -> list[nn.Module]:
    """Return the vision transformers that ``model`` is or contains, wrapped or not."""
    return [module for module in model.modules() if _is_transformer(module)]


def backbone_in(model: nn.Module) -> Backbone:
    """Return the one vision transformer that ``model`` is or contains, wrapped or not.

    Raises:
        InvalidInputError: if there is none, or more than one.

    """
    found = transformers_in(model)
    if len(found) != 1:
        raise InvalidInputError(
            f"one DINOv2 inside {name_of(type(model))}",
            f"{len(found)}",
            "Pass the vision transformer itself.",
        )
    return Backbone(found[0])


def grafted_backbone(model: object) -> Backbone:
    """Return the backbone of ``model``, a vision transformer that ``install`` has reached.

    Raises:
        NotGraftedError: if it does not have the methods that ``install`` adds.

    """
    if not hasattr(model, "get_self_attention"):
        raise NotGraftedError(
            "a vision transformer that install() has reached",
            name_of(type(model)),
            "Call dinov2_attn.install(model) first, and pass the transformer itself.",
        )
    return Backbone(model)


def flat_blocks(blocks: Sequence[nn.Module] | nn.ModuleList) -> list[nn.Module]:
    """Return the blocks of a flat or a chunked model, in order.

    Chunks are lists of blocks, padded in front with ``nn.Identity`` so that indices stay
    those of the whole model.
    """
    flat: list[nn.Module] = []
    for block in blocks:
        chunk = _chunk_in(block)
        flat.extend([block] if chunk is None else flat_blocks(chunk))
    return [block for block in flat if not isinstance(block, nn.Identity)]


def accepts(module: nn.Module, keyword: str) -> bool:
    """Return whether a graft gave ``keyword`` to the class of ``module``."""
    return getattr(type(module).forward, MARK, None) == keyword


def _chunk_in(module: nn.Module) -> nn.ModuleList | None:
    """Return the chunk that ``module`` is, or wraps as its only child (checkpointed, compiled)."""
    while not isinstance(module, nn.ModuleList):
        children = list(module.children())
        if len(children) != 1:
            return None
        module = children[0]
    return module


# The first test is cheap, and false for almost every module.


def _is_transformer(module: nn.Module) -> bool:
    return "blocks" in submodules(module) and role_of_module(module) is Role.TRANSFORMER
