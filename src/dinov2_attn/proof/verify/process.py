"""The environment of the processes in which copies run."""

from __future__ import annotations

import os
import sys


def environment() -> dict[str, str]:
    """Return this environment, with the paths of this process and without plugins of pytest."""
    # The package may be on a path that only this process has.
    path = os.pathsep.join([entry for entry in sys.path if entry])
    own = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **own, "PYTHONPATH": path}
