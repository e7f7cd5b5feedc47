"""``extract``: store the attention maps of a source of images in a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypedDict, overload

from dinov2_attn import _imports
from dinov2_attn.backbone.backbone import (
    Backbone,
    check_in_eval_mode,
    checked_module,
    transformers_in,
)
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.maps.geometry import geometry_of
from dinov2_attn.typing import Facet, Heads, Layers, Model, Statistic

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dinov2_attn.apps.extraction.job import Summary
    from dinov2_attn.apps.extraction.preview import Preview
    from dinov2_attn.apps.viz.images import ImageSize
    from dinov2_attn.apps.viz.reading import Numbers, Range


# Paths of files, or a dataset of torch's kind: anything with items and a length.
Source = Any
Format = Literal["safetensors", "zarr"]
Index = Literal["jsonl", "parquet"]
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
    facets: Sequence[Facet] | Facet
    statistics: Sequence[Statistic] | Statistic
    format: Format
    index: Index
    image_size: ImageSize
    max_pixels: int | None
    every: int
    fps: float | None
    range: Range
    mean: Numbers
    std: Numbers
    batch_size: int | None
    shard_size: int | None
    transform: Callable[[Any], Any] | None
    workers: int
    strict: bool
    retry: bool
    verify: bool
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
    facets: Sequence[Facet] | Facet = (),
    statistics: Sequence[Statistic] | Statistic = (),
    format: Format = "safetensors",
    index: Index = "jsonl",
    image_size: ImageSize = None,
    max_pixels: int | None = None,
    every: int = 1,
    fps: float | None = None,
    range: Range = None,
    mean: Numbers = None,
    std: Numbers = None,
    batch_size: int | None = None,
    shard_size: int | None = None,
    transform: Callable[[Any], Any] | None = None,
    workers: int = 0,
    strict: bool = False,
    retry: bool = False,
    verify: bool = False,
    progress: bool = False,
    name: str | None = None,
    random: bool = False,
    warning: str | None = None,
    dry_run: bool = False,
) -> Summary | Preview:
    """Store the attention maps of all images of ``source`` in the folder ``out``.

    The run is resumable: shards appear whole, each with its index, and a second run skips the
    finished ones. An image that cannot be decoded, or on which the model fails, is listed in
    ``unreadable.jsonl``; a batch that fails is run again image by image. Randomness in a dataset
    or a transform is seeded by the number of the item. Processes started by torchrun share the
    shards. The bytes are the same for any number of processes and interruptions, on the same kind
    of processor with the same libraries and number of threads; elsewhere the last bits of maps
    may differ. No gradients are computed. ``AttentionDataset`` reads ``out``.

    Args:
        model: A vision transformer in eval mode, on any device: DINOv2, or one of timm or
            transformers.
        source: A folder, a tar, a list of paths, an image, a glob, or several of these. Frames of
            videos are images too (``dinov2-attn[video]``): ``clip.mp4#12``, with their numbers
            and times in the index. A broken video is one image without maps. Or a
            map-style dataset or a list, whose items are tensors or Pillow's images, alone, first
            in a tuple, or in a dict as ``"image"`` or ``"pixel_values"``.
        out: The folder for the shards and the index.
        layers: The layers: ``None`` for all, an int for the last n, or a sequence of numbers. The
            last one by default.
        queries: The rows of attention: ``None`` for all, ``"cls"``, ``"registers"``,
            ``"patches"``, an int, a slice, or a sequence. Ints and slices are positions in
            ``[CLS, registers, patches]``. A sequence also takes patches ``(row, column)`` and text
            of the command line: ``"register:2"``, ``"3,17"`` for a patch, ``"#17"`` for a
            position. A patch is resolved in the grid of each image.
        heads: ``None`` for each, or ``"mean"``.
        dtype: The dtype of the stored maps: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        grid: ``(H, W)`` in patches, to resample all maps to one shape.
        artifacts: Whether to report artifact tokens, which are found in the same pass.
        facets: Which of ``"query"``, ``"key"`` and ``"value"`` to store of the patches, as the
            kernel was given them, with heads joined: ``(layers, C, h, w)``. On another ``grid`` a
            cell has the mean of what lies in it. Each image then runs through the whole model, and
            ``artifacts`` take a second pass.
        statistics: Which of ``"entropy"``, ``"distance"``, ``"received"``, ``"prefix_mass"``,
            ``"spread"`` and ``"centroid"`` to store of every token, ``(layers, heads, N)`` in
            float32, as ``dinov2_attn.statistics`` returns them; of ``"centroid"`` ``(layers, heads,
            N, 2)``. Without heads for their mean. On another ``grid`` a patch has the mean of what
            lies in it (the sum for ``"received"``). Places and distances stay in patches that the
            model saw. Each image then runs through the whole model, as for ``facets``.
        format: The files of the maps: ``"safetensors"``, or ``"zarr"`` for zarr arrays
            (``dinov2-attn[zarr]``), which have no bfloat16.
        index: ``"parquet"`` for an ``index.parquet`` beside ``index.jsonl``, with the columns of
            ``AttentionDataset.frame`` (``dinov2-attn[parquet]``).
        image_size: The length of the short side in pixels, or ``(height, width)``. By default
            the size of the image, up to 518.
        max_pixels: The maximum number of pixels. Larger images count as unreadable.
        every: Of a video, take the frames whose numbers are multiples of it.
        fps: Of a video, take at most so many frames of a second.
        range: ``(low, high)``, the values that become 0 and 1, or ``"auto"`` for the minimum and
            maximum of each image. By default the range of the format.
        mean: One number or one for each channel, to subtract from values between 0 and 1. By
            default ImageNet's, or 0.449 if the model does not take 3 channels.
        std: The same, to divide by. By default ImageNet's, or 0.226.
        batch_size: How many images of one size run together, up to 16 by default.
        shard_size: How many images a shard holds, up to 1024 and about 128 MiB by default.
        transform: Maps each picture (a file: Pillow's image, upright, in RGB) to a floating tensor
            ``(C, H, W)``, which the model takes unchanged, or to another picture. Tensors of a
            dataset are taken unchanged too.
        workers: How many processes decode, at most one for 64 images. They are spawned, so that
            scripts need ``if __name__ == "__main__"``.
        strict: Whether to stop at the first image without maps.
        retry: Whether to try images again that had no maps in an earlier run. Their shards are
            rewritten.
        verify: Whether to read finished shards again and compare their bytes with the checksums.
            Damaged ones are rewritten. Indexes are always compared.
        progress: Whether to show a progress bar.
        name: The name of the model in ``extraction.json``.
        random: Whether the weights are random, which is recorded with the maps.
        warning: Another sentence about the model, to be recorded there.
        dry_run: Whether to write nothing and return a ``Preview``.

    Returns:
        A ``Summary`` of the run, or a ``Preview`` of what would be written and skipped.

    Raises:
        InvalidInputError: If ``out`` belongs to another extraction, or an option is wrong.
        UnwritableOutputError: If ``out`` cannot be written, or another run is writing there.
        UnreadableFileError: If a source cannot be read or, with ``strict``, an image.
        UnavailableError: If the device no longer works, or a library is missing.

    """
    _imports.require("torchvision", "PIL", "tqdm", "safetensors", "filelock")
    from dinov2_attn.apps.extraction.job import Job
    from dinov2_attn.apps.extraction.options import at_least, check_options
    from dinov2_attn.apps.extraction.parquet import check_index
    from dinov2_attn.apps.extraction.plan import NO_MEANING
    from dinov2_attn.apps.extraction.sources import source_of
    from dinov2_attn.apps.viz.videos import sampling_of

    module = checked_module(model)
    check_in_eval_mode(module)
    geometry_of(module)  # raises if it is no vision transformer
    if any(Backbone(own).is_channel_adaptive for own in transformers_in(module)):
        raise InvalidInputError(
            "a model that sees the three channels of an image together",
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
        facets=facets,
        statistics=statistics,
        image_size=image_size,
        max_pixels=max_pixels,
        range=range,
        mean=mean,
        std=std,
        batch_size=batch_size,
        shard_size=shard_size,
        format=format,
    )
    parquet = check_index(index)
    workers = at_least(0, workers, "workers")
    given = source_of(source, transform, sampling_of(at_least(1, every, "every"), fps))
    warning = NO_MEANING if random else warning
    job = Job(
        model,
        given,
        Path(out),
        options,
        workers,
        strict,
        retry,
        verify,
        progress,
        name,
        warning,
        parquet,
    )
    return job.preview() if dry_run else job.run()
