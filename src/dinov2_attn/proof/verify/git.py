"""Upstream's history, read from git without importing it."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from dinov2_attn.errors import UnavailableError

_SECONDS = 600


@dataclass(frozen=True)
class Repository:
    """A clone: a working tree or a bare repository."""

    folder: str

    @classmethod
    def at(cls, address: str, scratch: Path) -> Repository:
        """Return the clone at ``address``, a path or any address for ``git clone``.

        Raises:
            UnavailableError: If git fails.

        """
        if Path(address).is_dir():
            return cls(address)
        folder = scratch / "clone"
        _run(["clone", "--quiet", "--bare", address, str(folder)])
        return cls(str(folder))

    def commits(self, revision: str) -> list[str]:
        """Return the full hash of ``revision``, or all hashes of HEAD's history for ``all``."""
        if revision == "all":
            return self._ask("log", "--reverse", "--date-order", "--format=%H", "HEAD").split()
        return [self._ask("rev-parse", "--verify", f"{revision}^{{commit}}").strip()]

    def date(self, commit: str) -> str:
        """Return the date of the commit: ``2025-08-14``."""
        return self._ask("log", "-1", "--format=%cs", commit).strip()

    def fingerprint(self, commit: str, folders: Sequence[str]) -> str:
        """Return a text that is equal for commits with equal content of ``folders``."""
        return self._ask("ls-tree", commit, "--", *folders)

    def read(self, commit: str, path: str) -> str | None:
        """Return the text of a file; ``None`` if the commit has no such file."""
        if not self._ask("ls-tree", commit, "--", path):
            return None
        return self._ask("show", f"{commit}:{path}")

    def unpack(self, commit: str, destination: Path, folders: Sequence[str] = ()) -> None:
        """Write the files of ``commit`` below ``destination``.

        Args:
            commit: Its hash.
            destination: A folder, which need not exist.
            folders: The folders to write, all by default. A clone may lack large files of others.

        Raises:
            UnavailableError: If a link points outside ``destination``.

        """
        there = [folder for folder in folders if self._ask("ls-tree", commit, "--", folder)]
        archive = _run(["-C", self.folder, "archive", commit, "--", *there])
        with tarfile.open(fileobj=BytesIO(archive)) as tar:
            if not hasattr(tarfile, "data_filter"):  # older Pythons without this security fix
                tar.extractall(destination)
                return
            try:
                tar.extractall(destination, filter="data")
            except tarfile.FilterError as error:
                raise UnavailableError(
                    "a commit whose files stay below its folder",
                    f"{commit}, where {error}",
                    "Check it out, inspect it, and name that folder.",
                ) from error

    def _ask(self, *arguments: str) -> str:
        return _run(["-C", self.folder, *arguments]).decode()


def is_bare(path: Path) -> bool:
    """Return whether ``path`` is a bare repository, not a working tree."""
    working = (path / ".git").exists()
    return not working and (path / "HEAD").is_file() and (path / "objects").is_dir()


def _run(arguments: list[str]) -> bytes:
    # Never wait for a password.
    command = ["git", "-c", "core.askPass=true", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=_SECONDS)
        problem = done.stderr.decode(errors="replace").strip() if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem is not None:
        raise UnavailableError(
            f"an answer to git {' '.join(arguments[:4])}",
            problem.splitlines()[-1] if problem else "nothing",
            "Name a folder, a clone with @REVISION, a URL that answers, or pypi:NAME==VERSION.",
        )
    return done.stdout
