"""Writing several files so that all of them appear or none."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from dinov2_attn._files import UNFINISHED, check_replaceable
from dinov2_attn.errors import UnwritableOutputError


@contextlib.contextmanager
def together(folder: Path) -> Iterator[Path]:
    """Yield an empty folder whose files move into ``folder`` when the block ends well.

    ``folder`` is made if it is not there. Files of the same names are replaced. If the
    block raises or a file cannot be written, ``folder`` is as it was before, or absent
    again, and an ``OSError`` comes out as ``UnwritableOutputError``.
    """
    folder = Path(os.path.abspath(folder))  # mkdir would look for what `..` leads back from
    try:
        with ExitStack() as undo:
            _make(folder, undo)
            # Inside of the folder, which alone is sure to be on the same file system.
            with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as temporary:
                new, old = Path(temporary, "new"), Path(temporary, "old")
                new.mkdir()
                old.mkdir()
                yield new
                _move(new, folder, old)
            undo.pop_all()
    except OSError as error:
        raise UnwritableOutputError(
            f"a folder that can be written at {folder}",
            f"{type(error).__name__}: {error}",
            "Nothing was left there. Name another folder or make room in this one.",
        ) from error


def _make(folder: Path, undo: ExitStack) -> None:
    """Make ``folder`` and what is missing above it; undoing removes what was made."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir()
        undo.callback(path.rmdir)


def _move(source: Path, folder: Path, aside: Path) -> None:
    """Move all files of ``source`` into ``folder``, or none of them."""
    with ExitStack() as undo:
        for file in sorted(source.iterdir()):
            final = folder / file.name
            if final.is_file() or final.is_symlink():
                os.replace(final, aside / file.name)
                undo.callback(os.replace, aside / file.name, final)
            else:
                check_replaceable(final)
            os.replace(file, final)
            undo.callback(final.unlink)
        undo.pop_all()
