"""Downloads: pinned wheels through pip, files through torch.hub, with a bound on every wait."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dinov2_attn._files import atomic_file
from dinov2_attn.errors import UnavailableError

TIMEOUT = 10.0


@dataclass(frozen=True)
class Wheel:
    """One file on PyPI: the distribution, its version and the digest of the wheel."""

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The requirement for pip: ``name==version``."""
        return f"{self.name}=={self.version}"


def fetch_wheel(wheel: Wheel) -> Path:
    """Return the path of ``wheel`` in the cache; download it first if it is not there.

    The cache is a folder under ``torch.hub.get_dir()``, so ``TORCH_HOME`` moves it. Every call
    checks the digest. A cached file with another digest is downloaded again. Dependencies of the
    wheel are not downloaded.

    Raises:
        UnavailableError: If pip cannot download the wheel, if the digest differs, or if the cache
            is not writable.

    """
    import torch  # slow, and needed only to find the cache

    cached = Path(torch.hub.get_dir()) / "dinov2_attn" / f"{wheel.name}-{wheel.version}.whl"
    if not (cached.is_file() and _digest(cached) == wheel.sha256):
        try:
            _fetch_into_cache(wheel, cached)
        except OSError as error:
            raise UnavailableError(
                f"a writable cache at {cached.parent}",
                str(error),
                "Set TORCH_HOME to a folder that you may write to.",
            ) from error
    return cached


def _fetch_into_cache(wheel: Wheel, cached: Path) -> None:
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
        file = download(wheel.requirement, Path(folder))
        found = _digest(file)
        if found != wheel.sha256:
            raise UnavailableError(
                f"{wheel.requirement} with sha256 {wheel.sha256}",
                f"{file.name} with sha256 {found}",
                "The file was deleted. Check which package index pip uses (pip config list).",
            )
        with atomic_file(cached) as unfinished:
            shutil.move(file, unfinished)


def download(requirement: str, folder: Path) -> Path:
    """Download the wheel of ``requirement`` by pip into an empty ``folder`` and return its path.

    Raises:
        UnavailableError: If pip cannot download it.

    """
    # The user's own pip knows their index, proxy and certificates.
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--retries=1"]
    what = ["--no-deps", "--only-binary=:all:", f"--dest={folder}", requirement]
    command = [sys.executable, "-m", "pip", "download", *options, *what]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last_line = (result.stderr.strip().splitlines() or ["no output from pip"])[-1]
        raise UnavailableError(
            f"{requirement} from PyPI through pip",
            last_line,
            "Check that `python -m pip download` works here (network and proxy settings).",
        )
    (file,) = folder.iterdir()
    return file


def download_url(url: str, path: Path) -> None:
    """Download ``url`` to ``path`` with torch.hub's own downloader, which shows its progress.

    Raises:
        OSError: If there is no network or ``path`` is not writable.
        HTTPException: If the connection breaks.

    """
    import torch

    with bounded_downloads():
        torch.hub.download_url_to_file(url, str(path))


@contextlib.contextmanager
def bounded_downloads() -> Iterator[None]:
    """Bound each wait for the network to ``TIMEOUT`` seconds, and redirect stdout to stderr.

    ``torch.hub`` has no timeout and waits for minutes where packets are dropped. The bound is
    therefore Python's default timeout of sockets, which holds for the whole process meanwhile.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
