"""The files of mutation testing name what exists: rooms, tests, functions and lines of code."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

import dinov2_attn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest itself needs it there

TESTS = Path(__file__).parents[1]
ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
PACKAGE = Path(dinov2_attn.__file__).parent
TOOLS = ROOT / "tools"


def read_toml(name):
    return tomllib.loads((TOOLS / name).read_text(encoding="utf-8"))


def split_module(dotted):
    """Return the file of the module in ``dotted``, and the names below it."""
    parts = dotted.split(".")
    for count in range(len(parts), 1, -1):
        file = PACKAGE.joinpath(*parts[1:count]).with_suffix(".py")
        if file.is_file():
            return file, parts[count:]
    return None, parts


def lines_of(dotted):
    """Return the lines of a function, each without its indentation, or ``None``."""
    file, names = split_module(dotted)
    if file is None:
        return None
    text = file.read_text(encoding="utf-8")
    node = ast.parse(text)
    for name in names:
        node = next((part for part in node.body if getattr(part, "name", None) == name), None)
        if node is None:
            return None
    return [line.strip() for line in text.splitlines()[node.lineno - 1 : node.end_lineno]]


def follow(lines, wanted):
    """Return whether the lines of ``wanted`` stand in ``lines`` in this order."""
    rest = iter(lines)
    return all(line in rest for line in wanted.splitlines())


def test_rooms_are_run_by_the_robot_and_name_what_exists():
    rooms = read_toml("mutation.toml")["room"]
    workflow = ROOT / ".github" / "workflows" / "mutation.yml"
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    assert jobs["mutate"]["strategy"]["matrix"]["room"] == list(rooms)
    for room in rooms.values():
        source = PACKAGE / room["source"]
        assert source.is_dir()
        assert not [name for name in room.get("except", []) if not (source / name).is_file()]
        for test in [*room["tests"], *room.get("without", [])]:
            file, _, name = test.partition("::")
            assert (TESTS / file).exists(), test
            assert not name or f"def {name}(" in (TESTS / file).read_text(encoding="utf-8"), test


def test_survivors_are_lines_of_today():
    gone = [
        f"{entry['function']}: {entry['was']}"
        for entry in read_toml("survivors.toml")["survivor"]
        if not follow(lines_of(entry["function"]) or [], entry["was"])
    ]
    assert not gone, "\n".join(gone)


def test_a_survivor_is_listed_once_and_has_a_reason():
    entries = read_toml("survivors.toml")["survivor"]
    assert all(entry.keys() == {"function", "was", "now", "why"} for entry in entries)
    assert all(entry["why"].endswith(".") for entry in entries)
    changes = [(entry["function"], entry["was"], entry["now"]) for entry in entries]
    assert len(set(changes)) == len(changes)


@pytest.mark.parametrize("name", ["grafting.api.install", "maps.result.Result.save"])
def test_a_function_is_found_by_its_name(name):
    assert lines_of(f"dinov2_attn.{name}")[0].startswith(f"def {name.rpartition('.')[2]}(")


@pytest.mark.parametrize("name", ["grafting.gone.install", "maps.result.Result.gone", "gone.x"])
def test_a_function_that_is_gone_is_noticed(name):
    assert lines_of(f"dinov2_attn.{name}") is None


def test_the_plugin_names_functions_and_fixtures_that_exist():
    spec = importlib.util.spec_from_file_location("plugin", TOOLS / "mutation_plugin.py")
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)
    gone = [name for name in plugin.CALLED_FOR_ALL if lines_of(name.replace(".x_", ".")) is None]
    assert not gone, "\n".join(gone)
    assert fixtures() >= plugin.GRAFTING_FIXTURES
    assert plugin._called_in_fresh_processes()


def fixtures():
    """Return the names of all functions of the tests that are fixtures."""
    return {
        node.name
        for file in TESTS.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and any("fixture" in ast.unparse(mark) for mark in node.decorator_list)
    }
