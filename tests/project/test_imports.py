"""Names that are imported with their first use: seen by dir() before, held after it."""

from __future__ import annotations

import pytest

from tests.support.subprocesses import python

SCRIPT = """
import importlib, sys
package = importlib.import_module(sys.argv[1])
before = set(dir(package))
assert set(package.__all__) <= before, set(package.__all__) - before
assert "torch" not in sys.modules or sys.argv[1] != "dinov2_attn"
for name in package.__all__:
    value = getattr(package, name)
    assert vars(package)[name] is value, name
    assert getattr(package, name) is value, name
assert before <= set(dir(package))
assert dir(package) == sorted(dir(package))
try:
    package.nothing_of_the_kind
except AttributeError as error:
    print(error)
"""


@pytest.mark.parametrize("package", ["dinov2_attn", "dinov2_attn.viz"])
def test_lazy_names_are_listed_and_kept(package, tmp_path):
    result = python("-c", SCRIPT, package, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"module {package!r} has no attribute 'nothing_of_the_kind'\n"
