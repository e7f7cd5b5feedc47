"""Fresh processes, for what a process can do only once, with or without a network."""

from __future__ import annotations

import os
import subprocess
import sys

# Nothing listens there: urllib is refused at once, also where GitHub could be reached.
_NOWHERE = "http://127.0.0.1:9"
OFFLINE = {
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), _NOWHERE),
    "no_proxy": "",
    "PIP_NO_INDEX": "1",
    "PIP_FIND_LINKS": "",
    "PIP_CONFIG_FILE": os.devnull,
}


def python(*arguments, cwd, **environment):
    """Run ``python *arguments`` in ``cwd`` and return the completed process."""
    if os.environ.get("MUTANT_UNDER_TEST") == "stats":  # which mutmut takes in its own process
        environment["MUTANT_UNDER_TEST"] = ""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
