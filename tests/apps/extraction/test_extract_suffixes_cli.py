"""What ``dinov2-attn extract`` says of what it passed over."""

from __future__ import annotations

import pytest

from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.demo.load import PATH as DEMO
from tests.support.extraction import draw

pytest_plugins = ["tests.support.cli_fixtures"]  # fixtures: imported, image, weights


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_the_command_lists_passed_over_files_and_succeeds(tmp_path, capsys, options):
    draw(tmp_path / "in" / "A.JFIF.png", (42, 42), 0).rename(tmp_path / "in" / "A.JFIF")
    for name in ("a.mp3", "b.mp3", "c"):
        (tmp_path / "in" / name).write_bytes(b"")
    given = ["extract", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *options]
    assert main([*given, "--weights", str(DEMO), "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert "1 images" in said
    assert "passed over: 2 .mp3, 1 without suffix" in said
