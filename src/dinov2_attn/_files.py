"""Files and folders that appear whole or not at all, in place of files only."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from dinov2_attn.errors import UnwritableOutputError

# The prefix of temporary folders, which a killed process leaves behind.
UNFINISHED = ".unfinished-"


def destination(path: Path) -> Path:
    """Return the file that writing ``path`` creates or replaces.

    That is ``path`` itself, or the file to which it is a link, over any number of links. The link
    stays. A file at the end of a link that is not there yet is created.

    Raises:
        OSError: If something else is there: a folder, a pipe, a socket or a device, which a
            rename would destroy. Or if ``path`` cannot be looked at: links in a circle, a name
            that is too long.

    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        found = None
    except ValueError as error:  # a null byte
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if found is not None:
        _check_is_file(path, target, found)
    return target


def write_file(path: str | Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all. Missing folders are created.

    Raises:
        UnwritableOutputError: If the file cannot be written.

    """
    path = Path(path)
    check_destination(path)
    with atomic_folder(path.parent) as unfinished:
        (unfinished / path.name).write_bytes(content)


def check_destination(path: Path) -> None:
    """Raise ``UnwritableOutputError`` if ``path`` is something else than a file."""
    try:
        destination(path)
    except OSError as error:
        raise UnwritableOutputError(
            f"a file that can be written at {path}",
            f"{type(error).__name__}: {error}",
            "Nothing was written. Name another file.",
        ) from error


def is_no_file(path: str | Path) -> bool:
    """Return whether there is something at ``path`` that is not a file: a pipe, device or folder.

    Reading a pipe may never end.
    """
    return os.path.exists(path) and not os.path.isfile(path)


def check_is_file(path: Path) -> None:
    """Raise ``OSError`` if ``path`` is a pipe or a device, whose bytes may never come, or a folder.

    Where they are waited for in code of a library, nothing else of this process may run.
    """
    if is_no_file(path):
        raise OSError(errno.EINVAL, "There is something that is not a file", str(path))


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path, and move the file written there to ``path`` at the end.

    The file is flushed to disk before it is moved. A crash cannot leave an empty file.

    Args:
        path: The destination. An existing file is replaced, and a link to one stays, see
            ``destination``.

    Yields:
        Where to write the file. Nothing is moved if the block raises.

    Raises:
        OSError: if the file cannot be written, or ``path`` is a folder, a pipe or a device.

    """
    # In the folder of the destination, so that the move is one rename.
    folder = destination(path).parent
    with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as temporary:
        unfinished = Path(temporary) / path.name
        yield unfinished
        _flush(unfinished)
        target = destination(path)
        _like(target, unfinished)
        os.replace(unfinished, target)


@contextlib.contextmanager
def atomic_folder(folder: Path, without: Iterable[str] = ()) -> Iterator[Path]:
    """Yield an empty folder, and move its files to ``folder`` at the end, all or none.

    Args:
        folder: The destination. It is created if it does not exist. Files of the same names
            are replaced, others are kept. Links to files stay, see ``destination``.
        without: The names of files in ``folder`` that are removed with the move.

    Yields:
        Where to write the files. If the block raises, ``folder`` is restored or removed.

    Raises:
        UnwritableOutputError: if a file cannot be written.

    """
    folder = Path(os.path.abspath(folder))  # mkdir would not resolve `..` in new folders
    try:
        with ExitStack() as undo:
            _make(folder, undo)
            # Inside the folder, because only there the file system is sure to be the same.
            with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as temporary:
                new, old = Path(temporary, "new"), Path(temporary, "old")
                new.mkdir()
                old.mkdir()
                yield new
                _move(new, folder, old, without)
            undo.pop_all()
    except OSError as error:
        raise UnwritableOutputError(
            f"a folder that can be written at {folder}",
            f"{type(error).__name__}: {error}",
            "Nothing was left there. Name another folder or make room in this one.",
        ) from error


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _check_is_file(path: Path, target: Path, found: os.stat_result) -> None:
    """Raise ``OSError`` unless ``found``, what is at ``path``, is a file that has its name."""
    to = f" behind the link to {target}" if target is not path else ""
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something")
        raise OSError(errno.EEXIST, f"There is {kind}{to}, which is not a file", str(path))
    # Links of /proc lead to open files, which may have no name any more, or that of another.
    if not (os.path.exists(target) and os.path.samestat(os.stat(target), found)):
        raise OSError(errno.EEXIST, "There is an open file without a name", str(path))


def _make(folder: Path, undo: ExitStack) -> None:
    """Create ``folder`` and its missing parents; ``undo`` removes them."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir()
        undo.callback(path.rmdir)


def _move(source: Path, folder: Path, backup: Path, without: Iterable[str]) -> None:
    """Move all files of ``source`` into ``folder``, or none of them; remove those ``without``."""
    with ExitStack() as elsewhere, ExitStack() as undo:
        for name in without:
            _set_aside(folder / name, backup, undo)
        for new in sorted(source.iterdir()):
            final, file, aside = destination(folder / new.name), new, backup
            if final.parent != folder:
                file, aside = _brought_near(new, final, elsewhere)
            _like(final, file)
            _set_aside(final, aside, undo)
            os.replace(file, final)
            undo.callback(final.unlink)
        undo.pop_all()


def _brought_near(file: Path, final: Path, stack: ExitStack) -> tuple[Path, Path]:
    """Copy ``file`` into a folder beside ``final``, perhaps on another disk, until the stack ends.

    Returns:
        The copy, and a folder for what is there now.

    """
    temporary = tempfile.TemporaryDirectory(dir=final.parent, prefix=UNFINISHED)
    near = Path(stack.enter_context(temporary))
    (near / "old").mkdir()
    shutil.copyfile(file, near / "new")
    _flush(near / "new")
    return near / "new", near / "old"


def _like(old: Path, new: Path) -> None:
    """Give ``new`` the permissions of ``old``, if that is there: it may be private."""
    if old.exists():
        os.chmod(new, stat.S_IMODE(os.stat(old).st_mode))


def _set_aside(file: Path, backup: Path, undo: ExitStack) -> None:
    """Move ``file`` into ``backup`` if it is there; ``undo`` brings it back."""
    if file.is_file() or file.is_symlink():
        aside = backup / f"{len(os.listdir(backup))}"  # two links may lead to one file
        os.replace(file, aside)
        undo.callback(os.replace, aside, file)
    else:
        destination(file)


def _flush(file: Path) -> None:
    """Wait until ``file`` is on its disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
