"""Pinned wheels from PyPI, without their dependencies, checked whenever they are used."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dinov2_attn.errors import UnavailableError


@dataclass(frozen=True)
class Wheel:
    """One file on PyPI: the distribution, its version and the full digest of the wheel."""

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """What pip is asked for: ``name==version``."""
        return f"{self.name}=={self.version}"


def fetch_wheel(wheel: Wheel) -> Path:
    """Return the path of ``wheel`` in the cache, downloaded by pip where it is not there yet.

    The cache is a folder under ``torch.hub.get_dir()``, so ``TORCH_HOME`` moves it. The
    digest is checked at every call: a cached file that fails is downloaded afresh.
    Raises ``UnavailableError`` if pip cannot fetch it, if what it fetches is something else, or
    if the cache cannot be written.
    """
    import torch  # slow, and only a download needs to know its folder

    cached = Path(torch.hub.get_dir()) / "dinov2_attn" / f"{wheel.name}-{wheel.version}.whl"
    if not (cached.is_file() and _digest(cached) == wheel.sha256):
        try:
            _download(wheel, cached)
        except OSError as error:
            raise UnavailableError(
                f"a cache that can be written at {cached.parent}",
                str(error),
                "Set TORCH_HOME to a folder that you may write to.",
            ) from error
    return cached


def _download(wheel: Wheel, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    # Beside the destination, so that the move is one rename and nobody sees half a file.
    with tempfile.TemporaryDirectory(dir=destination.parent) as folder:
        file = download(wheel.requirement, Path(folder))
        found = _digest(file)
        if found != wheel.sha256:
            raise UnavailableError(
                f"{wheel.requirement} with sha256 {wheel.sha256}",
                f"{file.name} with sha256 {found}",
                "Nothing was kept. Ask whoever runs the package index that pip uses.",
            )
        os.replace(file, destination)


def download(requirement: str, folder: Path) -> Path:
    """Return the wheel of ``requirement``, downloaded by pip into an empty ``folder``.

    Raises ``UnavailableError`` if pip cannot fetch it.
    """
    # The user's own pip knows their index, proxy and certificates.
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--retries=1"]
    what = ["--no-deps", "--only-binary=:all:", f"--dest={folder}", requirement]
    command = [sys.executable, "-m", "pip", "download", *options, *what]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last_line = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise UnavailableError(
            f"{requirement} from PyPI through pip",
            last_line,
            "See that `python -m pip download` works here, behind a proxy too.",
        )
    (file,) = folder.iterdir()
    return file


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
