"""``extract``: the attention maps of a source of images, in a folder, whatever interrupts it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, overload

from dinov2_attn import optional
from dinov2_attn.errors import InvalidInput
from dinov2_attn.maps.look import check_grafted
from dinov2_attn.typing import Heads, Layers, Model, Queries

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dinov2_attn.dataset.job import Summary
    from dinov2_attn.dataset.preview import Preview
    from dinov2_attn.show.images import ImageSize

Source = str | Path | Sequence[str | Path]


class ExtractOptions(TypedDict, total=False):
    """The options of ``extract``, for its overloads."""

    layers: Layers
    queries: Queries
    heads: Heads
    dtype: str
    grid: Sequence[int] | None
    outliers: bool
    image_size: ImageSize
    max_pixels: int | None
    batch_size: int | None
    shard_size: int | None
    workers: int
    strict: bool
    retry: bool
    progress: bool
    name: str | None
    random: bool


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
    queries: Queries = "cls",
    heads: Heads = None,
    dtype: str = "float32",
    grid: Sequence[int] | None = None,
    outliers: bool = False,
    image_size: ImageSize = None,
    max_pixels: int | None = None,
    batch_size: int | None = None,
    shard_size: int | None = None,
    workers: int = 0,
    strict: bool = False,
    retry: bool = False,
    progress: bool = False,
    name: str | None = None,
    random: bool = False,
    dry_run: bool = False,
) -> Summary | Preview:
    """Store the attention maps of all images of ``source`` in the folder ``out``.

    ==========  ======================================================================
    model       a grafted vision transformer in eval mode, on any device
    source      a folder, a tar, a list of paths, an image, or several of these
    layers      the blocks, as ``n`` of ``get_self_attention``; the last one by default
    queries     the rows, as there; no slice
    heads       ``None`` (each) or ``"mean"``
    dtype       of what is stored: ``"float32"``, ``"float16"``, ``"bfloat16"``
    grid        ``(H, W)``: resample all maps, so that they have one shape
    outliers    report artifact tokens, found in the same pass
    image_size  the short side, or (height, width); by default as it is, up to 518
    max_pixels  of an image; larger ones count as unreadable
    batch_size  images of one size that run together, by default up to 16
    shard_size  images in a shard, by default up to 1024 and about 128 MiB
    workers     processes that decode, at most one for 64 images; they are started anew, so that
                scripts need their ``__main__`` guarded
    strict      stop at an image that cannot be read, in place of listing it
    retry       try again what an earlier run could not read; its shards are written anew
    progress    show a bar with rate and time left
    name        what the model is called in ``extraction.json``
    random      whether its weights are random, which is written beside the maps
    dry_run     write nothing, return a ``Preview`` of what would be written and passed over
    ==========  ======================================================================

    Shards appear whole, each with its index; run again after whatever stopped it, and what
    is finished is passed over, with the very same bytes in the end. Processes that torchrun
    starts share the shards; these are the same for any number of them. ``AttentionDataset``
    reads ``out``. Nothing is differentiated. Returns a ``Summary``.

    Raises ``InvalidInput`` where ``out`` is another extraction's, ``UnwritableOutput`` where it
    cannot be written or another run is writing there, ``UnreadableFile`` for a source that
    cannot be read and, if ``strict``, an image, and ``NotGrafted``.
    """
    optional.require("torchvision", "PIL", "tqdm", "safetensors", "filelock")
    from dinov2_attn.dataset.job import Job
    from dinov2_attn.dataset.options import at_least, check_options

    check_grafted(model)
    if model.training:
        raise InvalidInput("a model in eval mode", "one in training mode", "Call model.eval().")
    options = check_options(
        model,
        layers=layers,
        queries=queries,
        heads=heads,
        dtype=dtype,
        grid=grid,
        outliers=outliers,
        image_size=image_size,
        max_pixels=max_pixels,
        batch_size=batch_size,
        shard_size=shard_size,
    )
    workers = at_least(0, workers, "workers")
    sources = [source] if isinstance(source, str | Path) else source
    job = Job(model, sources, Path(out), options, workers, strict, retry, progress, name, random)
    return job.preview() if dry_run else job.run()
