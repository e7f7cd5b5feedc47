"""Files around the package say the same, and what they name exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import dinov2_attn
from tests.support.markers import MARKERS, markers_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest itself needs it there

TESTS = Path(__file__).parents[1]
ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
FOR_DEVELOPERS = {"test", "lint", "docs", "mutation"}

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
HOOKS = ROOT / ".pre-commit-config.yaml"
DEPENDABOT = ROOT / ".github" / "dependabot.yml"
CITATION = ROOT / "CITATION.cff"
WITH_ADDRESSES = [*FORMS, CITATION, *ROOT.glob("*.md")]

# How tests start processes.
STARTING = {"python", "subprocesses.python", "subprocess.run", "subprocess.Popen"}

# From the schema of the Citation File Format 1.2.0.
CITATION_NEEDS = {"cff-version", "message", "title", "authors"}
CITATION_MAY_HAVE = CITATION_NEEDS | {
    *("abstract", "date-released", "identifiers", "keywords", "license", "preferred-citation"),
    *("references", "repository-code", "type", "url", "version"),
}
# From GitHub's syntax of issue forms.
FORM_FIELDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def hooks():
    return [hook for repo in read(HOOKS)["repos"] for hook in repo["hooks"]]


def pins(requirements):
    """Return `{name: version}` of requirements such as `ruff==0.17.6`."""
    return dict(requirement.split("==") for requirement in requirements)


def test_the_package_alone_holds_the_version():
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version"]
    source = (ROOT / PYPROJECT["tool"]["hatch"]["version"]["path"]).read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.+)"$', source, re.M) == [dinov2_attn.__version__]


def test_the_citation_is_of_this_version_and_licence():
    citation = read(CITATION)
    assert CITATION_NEEDS <= citation.keys() <= CITATION_MAY_HAVE
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == PROJECT["name"]
    assert citation["version"] == dinov2_attn.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    assert citation["keywords"] == PROJECT["keywords"]
    assert citation["repository-code"] == PROJECT["urls"]["Source"]


def test_the_changelog_begins_with_what_is_not_released():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    first, *released = headings
    assert first == "[Unreleased]"
    for heading in released:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\S*\] - \d{4}-\d\d-\d\d", heading)


def test_sections_of_the_changelog_are_those_of_keep_a_changelog():
    known = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for release in re.split(r"^## ", text, flags=re.M)[1:]:
        sections = re.findall(r"^### (.+)$", release, re.M)
        assert sections
        assert sections == sorted(set(sections), key=known.index)


def test_hooks_use_the_linters_of_the_project():
    lint = pins(EXTRAS["lint"])
    used = [pins(hook.get("additional_dependencies", [])) for hook in hooks()]
    assert [found["ruff"] for found in used if "ruff" in found] == [lint["ruff"]] * 2
    assert not [found for found in used if "mypy" in found], "mypy needs the environment's PyTorch"


def test_hooks_run_every_linter():
    entries = " ".join(hook["entry"] for hook in hooks())
    for command in ("ruff format", "ruff check", "mypy"):
        assert command in entries


def test_tools_of_hooks_come_from_pypi_at_one_version():
    assert {repo["repo"] for repo in read(HOOKS)["repos"]} == {"local"}
    for hook in hooks():
        if hook["language"] == "python":
            assert pins(hook["additional_dependencies"])


def test_no_file_is_larger_than_the_hook_lets_pass():
    (hook,) = [hook for hook in hooks() if hook["id"] == "check-added-large-files"]
    limit = int(hook["entry"].partition("--maxkb=")[2])
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a clone")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    large = [file for file in files if file.is_file() and file.stat().st_size > limit * 1024]
    assert [file.name for file in large] == ["model.safetensors"]
    for file in large:
        assert re.search(hook["exclude"], file.relative_to(ROOT).as_posix())


def test_all_is_every_extra_for_users():
    (everything,) = EXTRAS["all"]
    names = re.fullmatch(re.escape(PROJECT["name"]) + r"\[(.+)\]", everything)[1].split(",")
    assert set(names) == EXTRAS.keys() - FOR_DEVELOPERS - {"all", "fiftyone"}  # 0.7 GB


def test_addresses_are_of_one_repository():
    urls = PROJECT["urls"]
    assert urls.keys() == {"Homepage", "Documentation", "Source", "Issues", "Changelog"}
    home = urls["Source"]
    assert all(url == home or url.startswith((f"{home}/", f"{home}#")) for url in urls.values())
    for path in WITH_ADDRESSES:
        named = re.findall(r"https://github\.com/[\w.-]+/dinov2-attn\b", path.read_text("utf-8"))
        assert set(named) <= {home}, path.name


def test_dependabot_renews_actions_and_pins_once_a_week():
    updates = {update["package-ecosystem"]: update for update in read(DEPENDABOT)["updates"]}
    assert updates.keys() == {"github-actions", "pip"}
    for update in updates.values():
        assert update["schedule"] == {"interval": "weekly"}
        assert [group["patterns"] for group in update["groups"].values()] == [["*"]]


def test_supported_pythons_are_those_that_are_tested():
    stated = {
        text.rpartition(" :: ")[2]
        for text in PROJECT["classifiers"]
        if re.search(r"Python :: 3\.\d+$", text)
    }
    (workflow,) = [path for path in WORKFLOWS if path.name == "tests.yml"]
    tested = read(workflow)["jobs"]["newest"]["strategy"]["matrix"]["python"]
    assert set(tested) == stated
    assert PROJECT["requires-python"] == f">={tested[0]}"


def test_markers_are_registered_and_name_tests_that_exist():
    registered = PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]
    assert {line.partition(":")[0] for line in registered} == MARKERS.keys()
    for place in {place for places in MARKERS.values() for place in places}:
        file, _, name = place.partition("::")
        assert (TESTS / file).exists(), place
        assert not name or f"def {name}(" in (TESTS / file).read_text(encoding="utf-8"), place


def starts_a_process(function):
    calls = (node for node in ast.walk(function) if isinstance(node, ast.Call))
    return any(ast.unparse(call.func) in STARTING for call in calls)


def test_a_test_that_starts_a_process_is_marked():
    unmarked = [
        name
        for file in sorted(TESTS.rglob("test_*.py"))
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        for name in [f"{file.relative_to(TESTS).as_posix()}::{node.name}"]
        if starts_a_process(node) and not markers_of(name) & {"subprocess", "browser", "network"}
    ]
    assert not unmarked, "\n".join(unmarked)


@pytest.mark.parametrize(
    ("test", "markers"),
    [
        ("proof/test_git.py::test_a", {"subprocess", "slow"}),
        ("torch_features/test_compiled.py::test_a[x]", {"slow"}),
        ("maps/test_record.py::test_a_full_matrix_does_not_outlive_its_layer[x]", {"slow"}),
        ("maps/test_record.py::test_a_full_matrix_does_not_outlive_its_layer_too", set()),
        ("maps/test_record.py::test_a", set()),
    ],
)
def test_a_marker_is_that_of_the_folder_the_file_or_the_function(test, markers):
    assert markers_of(test) == markers


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_scripts_of_a_workflow_exist(workflow):
    steps = [step for job in read(workflow)["jobs"].values() for step in job["steps"]]
    commands = "\n".join(step.get("run", "") for step in steps)
    for path in re.findall(r"(?<![\w./-])(?:\.ci|tools|tests)/[\w./-]+", commands):
        assert (ROOT / path).exists(), path


def test_a_release_is_of_a_tag_and_publishes_what_was_tested():
    (workflow,) = [path for path in WORKFLOWS if path.name == "release.yml"]
    content = read(workflow)
    assert content[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads `on` as true
    publish = content["jobs"]["publish"]
    assert publish["needs"] == "build"
    assert publish["environment"] == "pypi"
    assert not [step for step in publish["steps"] if "run" in step]
    checks = [step["run"] for step in content["jobs"]["build"]["steps"] if "run" in step]
    assert sum("${GITHUB_REF_NAME#v}" in check for check in checks) == 2


@pytest.mark.parametrize(
    "form", [form for form in FORMS if form.name != "config.yml"], ids=lambda path: path.name
)
def test_forms_ask_in_the_syntax_of_github(form):
    content = read(form)
    assert content.keys() == {"name", "description", "labels", "body"}
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in content["body"]} <= FORM_FIELDS
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field["validations"]["required"] for field in fields)


def test_commands_that_forms_name_exist():
    text = "\n".join(form.read_text(encoding="utf-8") for form in FORMS)
    named = set(re.findall(r"dinov2-attn ([a-z]+)", text))
    assert named == {"doctor", "verify"}
    options = set(re.findall(r"(?<=[` ])--[a-z]+", text))
    assert options == {"--repo", "--device", "--package"}
    helps = "".join(map(command_help, named))
    assert not [option for option in options if f"{option} " not in helps]


def command_help(name):
    done = subprocess.run(
        [sys.executable, "-m", "dinov2_attn", name, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout
