"""What pytest loads in every run, for the sake of those that ask for the conformance suite.

pytest reads the options of a ``conftest.py`` in time only where a path is named, and
``--pyargs`` names a module. So an entry point looks at the command line, brings in the
options where the suite is asked for, and leaves every other run alone.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

# What users write, and the package that it stands for.
SUITE = "dinov2_attn.conformance"
_HOME = "dinov2_attn.proof.conformance"


def pytest_load_initial_conftests(early_config: pytest.Config, args: list[str]) -> None:
    """Add the suite's options if one of ``args`` names the suite or a part of it."""
    args[:] = [re.sub(rf"^{re.escape(SUITE)}\b", _HOME, argument) for argument in args]
    if any(argument.startswith(_HOME) for argument in args):
        early_config.pluginmanager.import_plugin(f"{_HOME}.plugin")
