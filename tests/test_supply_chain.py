"""What SECURITY.md says of this package and its workflows, held against their text.

That code in a checkpoint is not run, and that downloads are checked, is seen to happen in
test_models and test_source.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import dinov2_attn

PACKAGE = Path(dinov2_attn.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
WORKFLOWS = sorted((Path(__file__).parents[1] / ".github" / "workflows").glob("*.yml"))

# Modules that run what they read, and built-in functions that do.
RUNS_WHAT_IT_READS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
EVALUATES = {"eval", "exec", "compile", "__import__"}
LOADERS = {"torch.load", "torch.jit.load", "torch.package", "torch.hub.load"}

each_workflow = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)


def nodes(kind):
    """Yield each node of a kind with the path of its file below the package."""
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield source.relative_to(PACKAGE).as_posix(), node


def calls():
    return [(file, ast.unparse(node.func), node) for file, node in nodes(ast.Call)]


def test_nothing_unpickles_or_evaluates():
    imported = [(file, alias.name) for file, node in nodes(ast.Import) for alias in node.names]
    imported += [(file, node.module or "") for file, node in nodes(ast.ImportFrom)]
    assert not [pair for pair in imported if pair[1].partition(".")[0] in RUNS_WHAT_IT_READS]
    assert not [(file, name) for file, name, _ in calls() if name in EVALUATES]


def test_the_one_reader_of_checkpoints_takes_tensors_only():
    loads = [(file, ast.unparse(call)) for file, name, call in calls() if name in LOADERS]
    how = "torch.load(path, map_location='cpu', weights_only=True)"
    assert loads == [("upstream/reading.py", how)]


def test_nothing_is_fetched_in_the_clear():
    strings = [(file, node.value) for file, node in nodes(ast.Constant)]
    clear = re.compile(r"\b(http|ftp|git)://")
    assert not [pair for pair in strings if isinstance(pair[1], str) and clear.search(pair[1])]


@each_workflow
def test_actions_are_pinned_by_commit(workflow):
    """A tag can be moved to other code; the comment says which it was."""
    used = re.findall(r"uses: *(.+)", workflow.read_text())
    assert used
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)


@each_workflow
def test_a_workflow_may_read_and_a_job_that_writes_runs_nothing_of_a_checkout(workflow):
    header, jobs = workflow.read_text().split("jobs:\n")
    assert "\npermissions:\n  contents: read\n\n" in header
    for job in re.split(r"\n(?=  [\w-]+:\n)", jobs):
        if "write" in re.findall(r": (\w+)$", job, re.MULTILINE):
            assert "permissions:\n      issues: write\n    steps:" in job
            assert "checkout" not in job
            assert "pip" not in job
        else:
            assert job.count("actions/checkout@") == job.count("persist-credentials: false")
