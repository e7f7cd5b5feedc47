"""Regenerate the table of eras from upstream's git history.

    python -m dinov2_attn.proof.verify.rebuild_eras REPOSITORY > src/dinov2_attn/history/eras.json

``REPOSITORY`` is a clone or any address for ``git clone``. The table of a clone of DINOv3 is
``eras_dinov3.json``. Upstream's files are read from git and never imported.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

from dinov2_attn.history.eras import Era, digests_at, dumps, propose
from dinov2_attn.history.projects import DINOV2, project_at
from dinov2_attn.proof.verify.git import Repository

UPSTREAM = DINOV2.address


def rebuild(address: str | Path) -> tuple[Era, ...]:
    """Return the eras of the history of ``HEAD`` in the repository at ``address``.

    Raises:
        UnavailableError: If it is not a git repository, or cannot be reached.

    """
    eras: tuple[Era, ...] = ()
    with tempfile.TemporaryDirectory() as scratch:
        repository = Repository.at(str(address), Path(scratch))
        project = project_at(partial(repository.read, "HEAD"))
        for commit in repository.commits("all"):
            digests = digests_at(partial(repository.read, commit), project)
            eras = propose(eras, digests, commit, repository.date(commit))
    return eras


if __name__ == "__main__":
    sys.stdout.write(dumps(rebuild(sys.argv[1] if len(sys.argv) > 1 else UPSTREAM)))
