"""What ``dinov2-attn heatmap`` makes of a video, or of a folder of frames: a film."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn.apps.cli import plot_options
from dinov2_attn.apps.cli.argtypes import above_zero, positive
from dinov2_attn.apps.cli.drawing import Drawn, text_of
from dinov2_attn.apps.cli.model_options import Loaded
from dinov2_attn.apps.cli.report import options_of
from dinov2_attn.apps.viz.tokens import file_name
from dinov2_attn.errors import (
    InvalidInputError,
    OutOfRangeError,
    UnwritableOutputError,
    shown,
    shown_name,
)
from dinov2_attn.math.selection import name_token
from dinov2_attn.math.token_names import position_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from dinov2_attn.apps.cli.argtypes import Options
    from dinov2_attn.apps.viz.film_of_video import Asked, Limits
    from dinov2_attn.apps.viz.heatmap import Writer
    from dinov2_attn.apps.viz.images import ImageSize
    from dinov2_attn.apps.viz.provenance import Origin
    from dinov2_attn.apps.viz.videos import Sampling, Video
    from dinov2_attn.math.token_names import Token
    from dinov2_attn.typing import Layer

REFUSED = ("overview", "animate", "threshold", "target")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add to ``parser`` how a video becomes a film."""
    group = parser.add_argument_group("films of a video or of a folder of frames")
    group.add_argument(
        "--film",
        choices=("map", "overlay", "side"),
        default="map",
        help="The map alone, as in DINO v1, over the frame, or beside it. Default: map.",
    )
    group.add_argument(
        "--head",
        type=head,
        default="mean",
        metavar="I",
        help="The number of a head, or mean. Default: mean.",
    )
    add_sampling(group)


def add_sampling(group: Options) -> None:
    """Add ``--every`` and ``--fps``."""
    group.add_argument(
        "--every", type=positive, default=1, metavar="K", help="Take every K-th frame. Default: 1."
    )
    group.add_argument(
        "--fps",
        type=above_zero,
        metavar="F",
        help="Take at most F frames of a second of a video. A folder of frames is shown at F "
        "frames a second. Default: all frames of a video, 25 a second of a folder.",
    )


def head(text: str) -> int | str:
    """Read the number of a head, or mean."""
    if text != "mean" and not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"expected the number of a head, or mean; found {text!r}. Try 0."
        )
    return text if text == "mean" else int(text)


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Return which frames are taken."""
    from dinov2_attn.apps.viz import videos

    return videos.sampling_of(args.every, args.fps)


def is_film(path: Path) -> bool:
    """Return whether a film is made of ``path``: a video, or a folder with images."""
    from dinov2_attn.apps.viz.videos import images_in, is_video

    # Unlike that of a path, this one does not raise where a name is too long.
    return is_video(path) or (os.path.isdir(path) and bool(images_in(path)))


def check(paths: Sequence[Path], args: argparse.Namespace) -> None:
    """Raise what is wrong for every film, before torch is imported."""
    from dinov2_attn.apps.viz.videos import library

    films = [path for path in paths if is_film(path)]
    given = [f"--{name}" for name in REFUSED if getattr(args, name)]
    given += ["a second model"] if getattr(args, "second", None) else []
    given += [f"--format {args.format}"] if args.format != "png" else []
    given += [f"--outliers {args.outliers}"] if args.outliers in ("clip", "mask") else []
    given += ["--range"] if args.range is not None and not all(p.is_dir() for p in films) else []
    if films and given:
        raise InvalidInputError(
            f"images with {' and '.join(given)}",
            f"{films[0]}, of which a film is made",
            f"Leave {' and '.join(given)} out, or name images.",
        )
    own = {"film": "map", "head": "mean", "every": 1, "fps": None}
    alone = [f"--{name}" for name, usual in own.items() if getattr(args, name) != usual]
    if alone and not films:
        raise InvalidInputError(
            f"a video or a folder of frames with {' and '.join(alone)}",
            "images",
            f"Leave {' and '.join(alone)} out: pictures of images show every head.",
        )
    if films:
        library()


def check_head(args: argparse.Namespace, loaded: Loaded) -> None:
    """Raise ``OutOfRangeError`` if the model has no such head."""
    heads = loaded.geometry.heads
    if args.head != "mean" and args.head >= heads:
        raise OutOfRangeError(
            f"--head from 0 to {heads - 1}", str(args.head), "Choose one of these, or mean."
        )


def _check_sides(video: Video) -> None:
    """Raise ``InvalidInputError`` if nothing is left of a side: a film has even ones."""
    if min(video.size) < 2:
        raise InvalidInputError(
            "frames of at least 2 × 2 pixels",
            "{}, of {} × {}".format(video.path, *video.size),
            "Enlarge them, or draw a frame as an image: frame.png.",
        )


def write_film(
    loaded: Loaded, path: Path, folder: Path, size: ImageSize, args: argparse.Namespace
) -> Drawn:
    """Write the films of a video into ``folder``, all or none.

    The video is read twice: for the maps, which set one scale for all frames, and for the film.
    No more than a few frames are in memory.

    Raises:
        UnreadableFileError: If the video cannot be decoded to its end.
        InvalidInputError: If frames are of one pixel in height or width.
        OutOfRangeError: If frames have no such patch.
        UnwritableOutputError: If the folder cannot be written, or a file of the run before has
            changed since.

    """
    import numpy as np

    from dinov2_attn.apps.viz import heatmap
    from dinov2_attn.apps.viz.film_of_video import fitted
    from dinov2_attn.apps.viz.provenance import RECORD, files_of_older_run, record_of
    from dinov2_attn.apps.viz.videos import open_video

    video = open_video(path, sampling_of(args), args.max_pixels, args.range)
    _check_sides(video)
    sides = fitted(video.size, loaded.geometry.patch_size, size)
    grid = loaded.geometry.grid(*sides)
    tokens = plot_options.tokens_of(args, loaded)
    positions = [position_of(token, loaded.geometry.prefix, grid) for token in tokens]
    asked = _asked(loaded, positions, size, args)
    origin = _origin(path)
    with tempfile.TemporaryFile() as file:
        limits = _take_maps(loaded, video, asked, args, file)
        shape = (-1, len(tokens), *grid)
        file.flush()
        maps: Any = np.memmap(file, np.float32, "r").reshape(shape)
        films = _Films(loaded, video, asked, origin, args, maps, grid)
        files: dict[str, Writer] = {}
        for place, token in enumerate(tokens):
            files.update(films.of(place, token, limits[place]))
        record = record_of(args.command, [origin], loaded.name, options_of(args))
        removed = files_of_older_run(folder, RECORD, [*files, RECORD])
        heatmap.write(folder, files, removed, record)
        said = f"{loaded.name}; {_frames(maps)}; {grid[0]} × {grid[1]} patches"
        drawn = Drawn(folder, [*files, RECORD], removed, said, np.array(maps[-1, :1]))
        del films, maps
    return drawn


def _asked(
    loaded: Loaded, positions: Sequence[int], size: ImageSize, args: argparse.Namespace
) -> Asked:
    from dinov2_attn.apps.viz.film_of_video import Asked
    from dinov2_attn.apps.viz.reading import reading_for
    from dinov2_attn.maps.layers import recorded_in

    layers = recorded_in(loaded.model, plot_options.layers_of(args)).wanted
    layer: Layer = list(layers.values())[-1]
    mean, std = args.mean or loaded.mean, args.std or loaded.std
    reading = reading_for(loaded.geometry.channels, None, mean, std)
    return Asked(layer, args.head, positions, size, reading)


def _origin(path: Path) -> Origin:
    """Return the video with the digest of its file, or of the digests of all frames."""
    import hashlib

    from dinov2_attn.apps.viz.provenance import Origin, digest_of, origin_of
    from dinov2_attn.apps.viz.videos import images_in

    if not path.is_dir():
        return origin_of(path)
    digests = "".join(digest_of(file) for file in images_in(path))
    return Origin(str(path), hashlib.sha256(digests.encode()).hexdigest())


def _take_maps(
    loaded: Loaded, video: Video, asked: Asked, args: argparse.Namespace, file: Any
) -> list[Limits]:
    """Write the maps of all frames to ``file``; return the limits of each token."""
    from tqdm import tqdm

    from dinov2_attn.apps.viz.film_of_video import Limits, maps_of_frames

    style = plot_options.style_of(args, "inferno")
    limits = [Limits(style) for _ in asked.positions]
    patch = loaded.geometry.patch_size
    frames = maps_of_frames(loaded.model, video, patch, asked, args.device)
    hidden = True if args.quiet else None
    for maps in tqdm(
        frames, str(video.path), video.count, unit="frame", disable=hidden, leave=False
    ):
        for limit, values in zip(limits, maps, strict=True):
            limit.see(values)
        file.write(maps.tobytes())
    return limits


def _frames(maps: Any) -> str:
    return f"{len(maps)} frame{'s' * (len(maps) != 1)}"


class _Films:
    """The films of a video: one for each token."""

    def __init__(
        self,
        loaded: Loaded,
        video: Video,
        asked: Asked,
        origin: Origin,
        args: argparse.Namespace,
        maps: npt.NDArray[np.float32],
        grid: tuple[int, int],
    ) -> None:
        self.loaded, self.video, self.asked, self.args = loaded, video, asked, args
        self.maps, self.grid = maps, grid
        self.facts = {**origin.facts(), "model": loaded.name, "layer": asked.layer}

    def of(self, place: int, token: Token, limits: Limits) -> Iterator[tuple[str, Writer]]:
        """Yield names and writers of the files of one token."""
        import numpy as np

        suffix = "" if token == "cls" else f"-{file_name(token)}"
        facts = {**self.facts, "query": text_of(token)}
        maps = self.maps[:, place]
        yield f"film{suffix}.mp4", partial(self._write, maps, limits, facts)
        caption = self._caption(self.asked.positions[place], limits)
        yield f"film{suffix}.txt", lambda path: path.write_text(caption, encoding="utf-8")
        yield f"attention{suffix}.npy", lambda path: np.save(path, maps / self._tokens)

    @property
    def _tokens(self) -> int:
        height, width = self.grid
        geometry = self.loaded.geometry
        return int(geometry.prefix + height * width)

    def _write(
        self,
        maps: npt.NDArray[np.float32],
        limits: Limits,
        facts: dict[str, Any],
        path: Path,
    ) -> None:
        from dinov2_attn.apps.viz.film_of_video import FilmWriter, draw_frame
        from dinov2_attn.apps.viz.provenance import metadata_for
        from dinov2_attn.apps.viz.videos import library

        said = metadata_for("png", facts)
        about = {"title": said["Title"], "comment": said["Description"]}
        look, warning = self.args.film, self.loaded.warning
        try:
            with FilmWriter(path, self.video, look, about) as film:
                for frame, values in zip(self.video.frames(), maps, strict=True):
                    norm = limits.norm(values)
                    drawn = draw_frame(frame.pixels, values, norm, limits.style, look, warning)
                    film.write(drawn, frame.time)
        except library().FFmpegError as error:
            raise UnwritableOutputError(
                f"a film of {self.video.path} that H.264 can hold",
                f"{type(error).__name__}: {error}",
                "Give smaller frames, of at most 16384 pixels a side.",
            ) from error

    def _caption(self, position: int, limits: Limits) -> str:
        head = "mean of heads" if self.args.head == "mean" else f"head {self.args.head}"
        sides = "{} × {}".format(*self.grid)
        prefix = self.loaded.geometry.prefix
        token = name_token(position, prefix, self.grid)
        if position >= prefix:
            token += " (row, column)"
        name = shown_name(self.video.path.resolve().name)
        said = [
            f"Attention of {token}, in layer {self.asked.layer} (counted from 0): {head}.",
            f"Model: {shown_name(self.loaded.name)}.",
            f"{_frames(self.maps)} of {name}, {sides} patches.",
            limits.sentence(self._tokens),
            "Artifact tokens are not searched for.",
            *([f"{shown(self.loaded.warning)}."] if self.loaded.warning else []),
        ]
        return "\n".join(said) + "\n"
