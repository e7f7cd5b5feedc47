"""docs/types.md: mypy says of its code what the page says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# torch.hub has no types, which only the strict mode of this package reports.
UNTYPED = 'Call to untyped function "load"'


def test_mypy_says_what_the_page_shows(tmp_path):
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed: pip install 'dinov2-attn[lint]'")
    page = (ROOT / "docs" / "types.md").read_text("utf-8")
    right, wrong = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    (shown,) = re.findall(r"^```text\n(.*?)^```", page, re.S | re.M)
    assert mypy(tmp_path, right) == ""
    assert mypy(tmp_path, right + wrong) == shown


def mypy(folder, code):
    """Return the errors that mypy finds in ``code``, without their places."""
    file = folder / "page.py"
    file.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", str(file)],
        cwd=ROOT,  # with the options of the package, so that its cache serves
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.stderr == ""
    found = re.sub(r"^.*page\.py:\d+: ", "", done.stdout, flags=re.M).splitlines(keepends=True)
    return "".join(line for line in found if UNTYPED not in line)
