"""The entry point of pytest, which adds the options of the conformance suite.

pytest reads the options of a ``conftest.py`` early enough only if a path is given, and
``--pyargs`` gives the name of a module. pytest loads this module in every run, so it must stay
small: it checks the command line and changes nothing in other runs.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

# The name that users type, and the package that it stands for.
SUITE = "dinov2_attn.conformance"
_HOME = "dinov2_attn.proof.conformance"


def pytest_load_initial_conftests(early_config: pytest.Config, args: list[str]) -> None:
    """Add the options of the suite if one of ``args`` names the suite or a part of it."""
    args[:] = [re.sub(rf"^{re.escape(SUITE)}\b", _HOME, argument) for argument in args]
    if any(argument.startswith(_HOME) for argument in args):
        early_config.pluginmanager.import_plugin(f"{_HOME}.plugin")
