"""What the README says is what was measured."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent


def rows(file):
    return [line for line in file.read_text().splitlines() if line.startswith("|")]


def test_the_table_of_costs_is_quoted_from_the_benchmark():
    measured = rows(ROOT / "benchmarks" / "results" / "cost.md")
    section = (
        (ROOT / "README.md").read_text().partition("## What it costs")[2].partition("\n## ")[0]
    )
    quoted = [line for line in section.splitlines() if line.startswith("|")]
    assert len(quoted) > 10
    assert [line for line in quoted if line not in measured] == []
