"""``extract``: the attention maps of a source of images, in a folder, whatever interrupts it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypedDict, overload

from dinov2_attn import _optional
from dinov2_attn.backbone.backbone import grafted_backbone
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.typing import Heads, Layers, Model

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dinov2_attn.apps.extraction.job import Summary
    from dinov2_attn.apps.extraction.preview import Preview
    from dinov2_attn.apps.viz.images import ImageSize


# Paths of files, or a dataset of torch's kind: anything with items and a length.
Source = Any
# None, a position, a slice, text of the grammar of tokens, or a sequence of these and of patches.
TokenQueries = SupportsIndex | slice | str | Sequence[Any] | None


class ExtractOptions(TypedDict, total=False):
    """The options of ``extract``, for its overloads."""

    layers: Layers
    queries: TokenQueries
    heads: Heads
    dtype: str
    grid: Sequence[int] | None
    artifacts: bool
    image_size: ImageSize
    max_pixels: int | None
    range: Any
    mean: Any
    std: Any
    batch_size: int | None
    shard_size: int | None
    transform: Callable[[Any], Any] | None
    workers: int
    strict: bool
    retry: bool
    progress: bool
    name: str | None
    random: bool
    warning: str | None


@overload
def extract(
    model: Model,
    source: Source,
    out: str | Path,
    *,
    dry_run: Literal[False] = False,
    **options: Unpack[ExtractOptions],
) -> Summary: ...
@overload
def extract(
    model: Model,
    source: Source,
    out: str | Path,
    *,
    dry_run: Literal[True],
    **options: Unpack[ExtractOptions],
) -> Preview: ...
@overload
def extract(
    model: Model,
    source: Source,
    out: str | Path,
    *,
    dry_run: bool,
    **options: Unpack[ExtractOptions],
) -> Summary | Preview: ...


def extract(
    model: Model,
    source: Source,
    out: str | Path,
    *,
    layers: Layers = 1,
    queries: TokenQueries = "cls",
    heads: Heads = None,
    dtype: str = "float32",
    grid: Sequence[int] | None = None,
    artifacts: bool = False,
    image_size: ImageSize = None,
    max_pixels: int | None = None,
    range: Any = None,
    mean: Any = None,
    std: Any = None,
    batch_size: int | None = None,
    shard_size: int | None = None,
    transform: Callable[[Any], Any] | None = None,
    workers: int = 0,
    strict: bool = False,
    retry: bool = False,
    progress: bool = False,
    name: str | None = None,
    random: bool = False,
    warning: str | None = None,
    dry_run: bool = False,
) -> Summary | Preview:
    """Store the attention maps of all images of ``source`` in the folder ``out``.

    ==========  ======================================================================
    model       a grafted vision transformer in eval mode, on any device
    source      a folder, a tar, a list of paths, an image, a glob, or several of these; or a
                map-style dataset, or a list, of tensors or of Pillow's images, alone, first in a
                tuple, or in a dict as "image" or "pixel_values"
    layers      the blocks, as ``n`` of ``get_self_attention``; the last one by default
    queries     the rows, as there; no slice
    heads       ``None`` (each) or ``"mean"``
    dtype       of what is stored: ``"float32"``, ``"float16"``, ``"bfloat16"``
    grid        ``(H, W)``: resample all maps, so that they have one shape
    outliers    report artifact tokens, found in the same pass
    image_size  the short side, or (height, width); by default as it is, up to 518
    max_pixels  of an image; larger ones count as unreadable
    range       ``(low, high)``, the values that become 0 and 1, ``"auto"`` for the least and the
                greatest of each image; by default those of its format
    mean, std   one number or one for each channel, of values from 0 to 1; by default ImageNet's,
                or for other than 3 channels their averages, 0.449 and 0.226
    batch_size  images of one size that run together, by default up to 16
    shard_size  images in a shard, by default up to 1024 and about 128 MiB
    transform   makes of each picture (a file: Pillow's, upright, in RGB) a floating tensor
                (C, H, W), which the model sees as it is, or another picture. Tensors of a
                dataset are seen as they are too
    workers     processes that decode, at most one for 64 images; they are started anew, so that
                scripts need their ``__main__`` guarded
    strict      stop at an image without maps, in place of listing it
    retry       try again what has no maps of an earlier run; its shards are written again
    progress    show a bar with rate and time left
    name        what the model is called in ``extraction.json``
    random      whether its weights are random, which is written beside the maps
    warning     another sentence about the model, written there too
    dry_run     write nothing, return a ``Preview`` of what would be written and passed over
    ==========  ======================================================================

    Shards appear whole, each with its index; run again after whatever stopped it, and what
    is finished is passed over. An image that cannot be decoded, or on which the model fails, is
    listed in ``unreadable.jsonl``; a batch that fails is run again image by image. What is random
    in a dataset or a transform is drawn for each item from its number. Processes that torchrun
    starts share the shards. In the end the bytes are the same, whatever was interrupted and
    however many processes there are, on the same kind of processor with the same libraries and
    number of threads; elsewhere the last bits of maps differ. ``AttentionDataset`` reads ``out``.
    Nothing is differentiated. Returns a ``Summary``.

    Raises ``InvalidInputError`` where ``out`` is another extraction's, ``UnwritableOutputError``
    where it cannot be written or another run is writing there, ``UnreadableFileError`` for a source
    that cannot be read and, if ``strict``, an image, ``UnavailableError`` where the device works no
    more, and ``NotGraftedError``.
    """
    _optional.require("torchvision", "PIL", "tqdm", "safetensors", "filelock")
    from dinov2_attn.apps.extraction.job import Job
    from dinov2_attn.apps.extraction.options import at_least, check_options
    from dinov2_attn.apps.extraction.plan import NO_MEANING
    from dinov2_attn.apps.extraction.sources import source_of

    backbone = grafted_backbone(model)
    if model.training:
        raise InvalidInputError(
            "a model in eval mode", "one in training mode", "Call model.eval()."
        )
    if backbone.is_channel_adaptive:
        raise InvalidInputError(
            "a model that sees the three channels of a photograph together",
            "a channel-adaptive one, with maps of its own for each channel",
            "Pass tensors of your channels (B, C, H, W) to attention_maps(model, images).",
        )
    options = check_options(
        model,
        layers=layers,
        queries=queries,
        heads=heads,
        dtype=dtype,
        grid=grid,
        artifacts=artifacts,
        image_size=image_size,
        max_pixels=max_pixels,
        range=range,
        mean=mean,
        std=std,
        batch_size=batch_size,
        shard_size=shard_size,
    )
    workers = at_least(0, workers, "workers")
    given = source_of(source, transform)
    warning = NO_MEANING if random else warning
    job = Job(model, given, Path(out), options, workers, strict, retry, progress, name, warning)
    return job.preview() if dry_run else job.run()
