"""``AttentionLogger``: attention maps of fixed images in the log of a training."""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
import torch.distributed as dist
from torch import nn

from dinov2_attn import _imports
from dinov2_attn.apps.training.backbones import backbone_of, is_compiled_inside
from dinov2_attn.backbone.backbone import checked_module
from dinov2_attn.backbone.undisturbed import undisturbed
from dinov2_attn.errors import (
    Dinov2AttnError,
    InvalidInputError,
    NotDrawnWarning,
    in_one_line,
)
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.geometry import geometry_of
from dinov2_attn.maps.one_batch import attention_maps
from dinov2_attn.maps.places import Head
from dinov2_attn.math.attention import without_autocast
from dinov2_attn.math.selection import whole_number
from dinov2_attn.math.token_names import Token, position_of, read_token
from dinov2_attn.typing import RecordedLayers

if TYPE_CHECKING:
    from dinov2_attn.apps.viz.images import LoadedImage
    from dinov2_attn.apps.viz.style import Style

log = logging.getLogger(__name__)

DPI = 100


class AttentionLogger:
    """Logs attention maps of fixed images every ``every`` steps of a training.

    >>> writer = SummaryWriter("runs/a")
    >>> pictures = AttentionLogger(model, ["cat.jpg"], writer, every=500)
    >>> for step, batch in enumerate(loader):
    ...     ...  # train
    ...     pictures(step)

    The training is the same with it and without it, bit for bit. The images run through the model
    in eval mode, without gradients and without autocast. Afterwards modes, buffers and the
    generators of PyTorch, NumPy and Python are as they were. Forward hooks of the model run too.
    With several processes, the first one alone draws, and no other waits for it.

    A picture is called by layer, head, query and image: ``attention/layer11/mean/cls/0``.

    Wrong arguments raise where the logger is made. What fails later does not end the training: it
    is one ``NotDrawnWarning``, and the next picture is tried again.

    Args:
        model: What is trained. Wrappers of DDP and ``torch.compile`` are looked through. Of a
            compiled model the same weights run in eager mode.
        images: The images: paths, images of Pillow, arrays, or inputs of the model ``(C, H, W)``;
            also a batch ``(B, C, H, W)``.
        to: Where pictures go: a ``SummaryWriter`` of TensorBoard, a run of Weights & Biases, a
            logger of Lightning, or a list of these. Others have ``add_image`` or ``log_image``.
        every: How many steps lie between pictures. The first call always draws.
        backbone: The vision transformer in ``model``, as a path such as ``"teacher.backbone"`` or
            as a module. By default the only one.
        layers: The layers, as for ``attention_maps``. By default the last.
        queries: The tokens whose attention is drawn: ``"cls"``, ``"register:2"``, a patch
            ``(row, column)``, a position, or a list of these.
        heads: ``"mean"``, None for each head, or a list of heads.
        name: What the names of pictures begin with.
        style: How maps are drawn. With fixed limits, ``viz.Style(limits=(0, 20))``, steps can be
            compared.

    Raises:
        InvalidInputError: If an argument is wrong, or the model is sharded by FSDP.
        UnreadableFileError: If an image cannot be read.
        UnavailableError: If a library for pictures is missing.

    """

    def __init__(
        self,
        model: nn.Module,
        images: Any,
        to: Any,
        *,
        every: int = 1,
        backbone: str | nn.Module | None = None,
        layers: RecordedLayers = 1,
        queries: Token | Sequence[Token] = "cls",
        heads: Head | Sequence[Head] | None = "mean",
        name: str = "attention",
        style: Style | None = None,
    ) -> None:
        _imports.require("torchvision", "matplotlib", "PIL")
        from dinov2_attn.apps.training.images import loaded
        from dinov2_attn.apps.training.sinks import sinks_of
        from dinov2_attn.apps.viz.style import Style

        self.backbone = _checked_model(model, backbone)
        self.every = _at_least_one(every)
        self._sinks = sinks_of(to)
        self._layers, self._name = layers, name
        self._queries, self._heads = _tokens(queries), heads
        self._style = style or Style()
        self._turn: int | None = None  # of the last picture
        self._told = False
        with unchanged(self.backbone):
            self._images = loaded(images, self.backbone)
            self._check()
        if is_compiled_inside(self.backbone):
            log.info("the model is compiled: pictures show an eager pass of the same weights")

    def __call__(self, step: SupportsIndex) -> bool:
        """Draw if ``every`` steps have passed since the last picture.

        Args:
            step: The number of the step.

        Returns:
            Whether pictures were logged.

        """
        number = operator.index(step)
        turn = number // self.every
        if turn == self._turn or not is_first_process():
            return False
        self._turn = turn
        try:
            self._draw(number)
        except Exception as error:  # a picture is not worth a training
            self._tell(error, number)
            return False
        return True

    def _draw(self, step: int) -> None:
        with unchanged(self.backbone):
            for i, image in enumerate(self._images):
                maps = self._maps(image)
                for tag, layer, head, query in self._pictures(maps):
                    pixels = self._pixels(maps, image, layer, head, query)
                    for sink in self._sinks:
                        sink.add(f"{self._name}/{tag}/{i}", pixels, step)

    def _maps(self, image: LoadedImage) -> AttentionMaps:
        like = next(self.backbone.parameters())
        images = image.tensor[None].to(like.device, like.dtype)
        geometry = geometry_of(self.backbone)
        grid = geometry.grid(*images.shape[-2:])
        rows = [position_of(query, geometry.prefix, grid) for query in self._queries]
        return attention_maps(
            self.backbone, images, self._layers, queries=list(dict.fromkeys(rows))
        ).cpu()

    def _pictures(self, maps: AttentionMaps) -> Iterator[tuple[str, Any, Head, Token]]:
        """Yield the name of each picture of an image, with layer, head and query."""
        for layer, weights in zip(maps.layers, maps.weights, strict=True):
            for head in self._chosen_heads(weights.shape[1]):
                called = "mean" if head == "mean" else f"head{head}"
                for query in self._queries:
                    yield f"layer{layer}/{called}/{_text_of(query)}", layer, head, query

    def _chosen_heads(self, count: int) -> Sequence[Head]:
        if self._heads is None:
            return range(count)
        several = isinstance(self._heads, Sequence) and not isinstance(self._heads, str)
        return self._heads if several else [self._heads]  # type: ignore[list-item,return-value]

    def _pixels(
        self, maps: AttentionMaps, image: LoadedImage, layer: Any, head: Head, query: Token
    ) -> Any:
        from dinov2_attn.apps.viz.pictures import plot
        from dinov2_attn.apps.viz.saving import pixels_of

        options: Any = {"layer": layer, "head": head, "query": query, "style": self._style}
        axes = plot(maps, image=image.picture, **options)
        return pixels_of(axes.figure, DPI)  # type: ignore[arg-type]

    def _check(self) -> None:
        """Raise what is wrong with layers, heads and queries, before the training begins."""
        for image in self._images:
            maps = self._maps_or_reason(image)
            for _, layer, head, query in self._pictures(maps):
                maps.at(layer, head, query)

    def _maps_or_reason(self, image: LoadedImage) -> AttentionMaps:
        """Return the maps; raise ``InvalidInputError`` for what the model raises."""
        try:
            return self._maps(image)
        except (Dinov2AttnError, Warning):
            raise
        except Exception as error:  # code of the model may raise anything
            from dinov2_attn.apps.viz.inference import summary_of

            raise InvalidInputError(
                "images that the model can be run on",
                f"one of {image.tensor.shape[1]} × {image.tensor.shape[2]} ({summary_of(error)})",
                "Pass inputs (C, H, W) of the size that the model takes.",
            ) from error

    def _tell(self, error: Exception, step: int) -> None:
        text = (
            f"attention of step {step} was not drawn ({type(error).__name__}: "
            f"{in_one_line(error)}). The training goes on, and further failures are not reported"
        )
        if self._told:
            log.debug("%s", text)
            return
        self._told = True
        try:
            warnings.warn(text, NotDrawnWarning, stacklevel=3)
        except NotDrawnWarning:  # where warnings are errors
            log.warning("%s", text)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Run a pass of ``model`` inside that the training does not notice."""
    import numpy as np

    device = next(model.parameters()).device
    numbers = np.random.get_state()
    try:
        with ExitStack() as stack:
            stack.enter_context(undisturbed(model, device))
            # Maps in half precision would be coarse. And in some versions of PyTorch autocast keeps
            # the casts of a pass without gradients for the training's next one.
            stack.enter_context(without_autocast(device))
            if is_compiled_inside(model):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        np.random.set_state(numbers)


def is_first_process() -> bool:
    """Return whether this is the only process of a training, or the first of them."""
    several = dist.is_available() and dist.is_initialized()
    return not several or dist.get_rank() == 0


def _checked_model(model: object, backbone: str | nn.Module | None) -> nn.Module:
    found = backbone_of(checked_module(model), backbone)
    if is_compiled_inside(found) and not hasattr(getattr(torch, "compiler", None), "set_stance"):
        raise InvalidInputError(
            "a model that is not compiled, or PyTorch 2.6 or later",
            f"a compiled one and PyTorch {torch.__version__}",
            "Pass the module that torch.compile was given.",
        )
    return found


def _at_least_one(every: int) -> int:
    number = whole_number(every, "every, the steps between pictures,")
    if number < 1:
        raise InvalidInputError("every of 1 at least", str(number), "Try 500.")
    return number


def _tokens(queries: Any) -> list[Token]:
    """Return tokens of any form as a list."""
    is_patch = isinstance(queries, tuple) and all(isinstance(i, int) for i in queries)
    several = isinstance(queries, Sequence) and not isinstance(queries, str) and not is_patch
    tokens = [
        read_token(q) if isinstance(q, str) else q for q in (queries if several else [queries])
    ]
    if not tokens:
        raise InvalidInputError("at least one query", repr(queries), 'Try "cls".')
    return tokens


def _text_of(token: Token) -> str:
    if isinstance(token, tuple | list):
        return "patch_{}_{}".format(*token)
    return token.replace(":", "_") if isinstance(token, str) else f"token_{token}"
