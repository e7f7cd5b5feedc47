"""The table of eras, made anew from upstream's git history.

    python -m dinov2_attn.upstream.history REPOSITORY > src/dinov2_attn/upstream/eras.json

``REPOSITORY`` is a clone or whatever ``git clone`` takes. Upstream's files are read out of
git, never imported.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from dinov2_attn.errors import Unavailable
from dinov2_attn.upstream.eras import Era, digests_at, dumps, propose

UPSTREAM = "https://github.com/facebookresearch/dinov2"


def rebuild(repository: str | Path) -> tuple[Era, ...]:
    """Return the eras of the history that leads to ``HEAD`` of ``repository``.

    Raises ``Unavailable`` where it is no git repository or does not answer.
    """
    eras: tuple[Era, ...] = ()
    with _cloned(str(repository)) as clone:
        # By date, but no commit before its parents: the order in which the table is kept.
        for line in _git(clone, "log", "--reverse", "--date-order", "--format=%H %cs").splitlines():
            commit, date = line.split()
            eras = propose(eras, digests_at(partial(_show, clone, commit)), commit, date)
    return eras


@contextmanager
def _cloned(repository: str) -> Iterator[str]:
    if Path(repository).is_dir():
        yield repository
        return
    with tempfile.TemporaryDirectory() as folder:
        _git(folder, "clone", "--quiet", "--bare", "--single-branch", repository, folder)
        yield folder


def _show(clone: str, commit: str, path: str) -> str | None:
    # Asked first: `git show` fails in one way for a file that is not there and for all else.
    if not _git(clone, "ls-tree", commit, path):
        return None
    return _git(clone, "show", f"{commit}:{path}")


def _git(folder: str, *arguments: str) -> str:
    # Nobody is there to type a password.
    command = ["git", "-c", "core.askPass=true", "-C", folder, *arguments]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", check=False, timeout=300
        )
        problem = result.stderr.strip() if result.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem is not None:
        raise Unavailable(
            f"an answer to git {arguments[0]}",
            problem,
            f"Name a clone of {UPSTREAM}, or connect to it.",
        )
    return result.stdout


if __name__ == "__main__":
    sys.stdout.write(dumps(rebuild(sys.argv[1] if len(sys.argv) > 1 else UPSTREAM)))
