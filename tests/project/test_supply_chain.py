"""The claims of SECURITY.md, checked in the text of this package and its workflows.

test_models and test_source test that code in a checkpoint is not run and that downloads are
checked.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

import dinov2_attn

PACKAGE = Path(dinov2_attn.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
WORKFLOWS = sorted((Path(__file__).parents[2] / ".github" / "workflows").glob("*.yml"))

# Modules and built-in functions that run code from data.
RUNS_WHAT_IT_READS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
EVALUATES = {"eval", "exec", "compile", "__import__"}
LOADERS = {"torch.load", "torch.jit.load", "torch.package", "torch.hub.load"}

# The jobs that may write, and what.
MAY_WRITE = {
    "upstream/report": {"issues"},
    "release/publish": {"attestations", "id-token"},
}

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
    assert loads == [("apps/weights/reading.py", how)]


def test_nothing_is_fetched_in_the_clear():
    strings = [(file, node.value) for file, node in nodes(ast.Constant)]
    clear = re.compile(r"\b(http|ftp|git)://")
    assert not [pair for pair in strings if isinstance(pair[1], str) and clear.search(pair[1])]


@each_workflow
def test_actions_are_pinned_by_commit(workflow):
    """A tag can be moved to other code. The comment names the version."""
    used = re.findall(r"uses: *(.+)", workflow.read_text())
    assert used
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)


@each_workflow
def test_workflows_only_read_and_jobs_that_write_run_no_code_of_a_checkout(workflow):
    content = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    assert content["permissions"] == {"contents": "read"}
    for name, job in content["jobs"].items():
        may_write = MAY_WRITE.get(f"{workflow.stem}/{name}", set())
        assert job.get("permissions", {}) == dict.fromkeys(may_write, "write")
        for step in job["steps"]:
            if "actions/checkout@" in step.get("uses", ""):
                assert not may_write
                assert step["with"]["persist-credentials"] is False
            if may_write:
                assert not re.search(r"\bpip\b|\bpython|git clone|\./", step.get("run", ""))


@each_workflow
def test_text_of_others_is_not_put_into_commands(workflow):
    """The name of a branch or the title of an issue would run in the shell."""
    content = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    for job in content["jobs"].values():
        for step in job["steps"]:
            assert not re.search(r"\$\{\{ *(github|inputs|steps|needs)\b", step.get("run", ""))
