"""Types: what type checkers find, and what calls return."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import json
import subprocess
import sys
import types
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_origin

import pytest
import torch
from torch import Tensor, nn

import dinov2_attn
from dinov2_attn import ArtifactTokens, AttentionMaps, Recording
from dinov2_attn.errors import InvalidInputError, NotGraftedError
from dinov2_attn.grafting.models import METHODS
from dinov2_attn.maps.rollout import Rollout
from dinov2_attn.typing import GraftedVisionTransformer
from tests.support.recordings import IMAGES, build
from tests.support.strategies import noise
from tests.support.subprocesses import python
from tests.support.upstreams import WITH_MODELS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "typing_tests"
FILES = sorted(FOLDER.glob("*.py"))


def run(tool, *arguments):
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed: pip install 'dinov2-attn[lint]'")
    command = [sys.executable, "-m", tool, *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )


def test_mypy_finds_the_types_that_are_stated():
    done = run("mypy", str(FOLDER))
    assert done.stdout == f"Success: no issues found in {len(FILES)} source files\n", done.stderr


def test_pyright_finds_the_types_that_are_stated():
    done = run("basedpyright", "--outputjson", "--pythonpath", sys.executable)
    found = json.loads(done.stdout)
    assert found["generalDiagnostics"] == []
    assert found["summary"]["filesAnalyzed"] == len(FILES)


# The same files, run: results have the types that are stated.


def holds(value: object, hint: Any) -> bool:
    """Return whether ``value`` is what ``hint`` says."""
    if hint is Any:
        return True
    if hint is GraftedVisionTransformer:
        return all(hasattr(value, name) for name in vars(hint) if not name.startswith("_"))
    if typing.is_typeddict(hint):
        return isinstance(value, dict) and hint.__required_keys__ <= value.keys()
    if isinstance(hint, types.UnionType):
        return any(holds(value, one) for one in get_args(hint))
    if get_origin(hint) is typing.Literal:
        return value in get_args(hint)
    origin = get_origin(hint) or hint
    return isinstance(value, origin) and parts_hold(value, origin, get_args(hint))


def parts_hold(value, origin, args):
    if origin in (AttentionMaps, Recording):
        return all(holds(entry, args[0] if args else Tensor) for entry in value.weights)
    if origin in (Rollout, ArtifactTokens):
        return all(holds(part, args[0] if args else Tensor) for part in tensors_of(value))
    if origin is list or (origin is tuple and args[-1] is ...):
        return all(holds(entry, args[0]) for entry in value)
    return origin is not tuple or (len(value) == len(args) and all(map(holds, value, args)))


def tensors_of(value):
    names = [f.name for f in dataclasses.fields(value) if f.name not in value._LAYOUT]
    return [getattr(value, name) for name in names]


def check(value, hint):
    assert holds(value, hint), (hint, value)
    return value


@functools.cache
def functions_of(name):
    spec = importlib.util.spec_from_file_location(f"typing_tests_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.assert_type = check
    return [
        function
        for _, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == spec.name
    ]


FUNCTIONS = [f for name in ("models", "results") for f in functions_of(name)]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_results_have_the_types_that_are_stated(models, function, tmp_path):
    model = build(models)
    given = {
        "model": model,
        "images": IMAGES,
        "batches": [IMAGES, noise(1, 3, 4, 4, seed=1, dtype=torch.float64)],
        "block": model.blocks[0],
        "attention": model.blocks[0].attn,
        "tokens": noise(2, 5, 8, seed=2, dtype=torch.float64),
        "path": tmp_path / "maps.safetensors",
    }
    function(**{name: given[name] for name in inspect.signature(function).parameters})


def test_a_wrong_type_would_be_noticed():
    one = torch.zeros(1)
    assert holds((one,), tuple[Tensor, ...])
    assert not holds((one, [one]), tuple[Tensor, ...])
    assert not holds([one], tuple[Tensor, ...])
    assert not holds((one, [one]), tuple[Any, tuple[Tensor, ...]])
    assert not holds({"x_prenorm": one}, dinov2_attn.typing.Features)
    assert not holds(nn.Linear(1, 1), GraftedVisionTransformer)
    assert not holds(AttentionMaps(([one],), (0,), (1, 1), 1), AttentionMaps)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads is new in 3.11")
@pytest.mark.parametrize("name", METHODS)
def test_the_protocol_takes_what_the_graft_takes(name):
    ours = list(inspect.signature(METHODS[name]).parameters.values())
    protocol = GraftedVisionTransformer
    # What a protocol keeps of overloads is one function for all: they are found by their name.
    kept = SimpleNamespace(
        __module__=protocol.__module__, __qualname__=f"{protocol.__qualname__}.{name}"
    )
    overloads = typing.get_overloads(kept)
    assert len(overloads) == 2
    for overload in overloads:
        stated = list(inspect.signature(overload).parameters.values())
        assert [(p.name, p.kind, p.default) for p in stated] == [
            (p.name, p.kind, p.default) for p in ours
        ]


def test_a_recording_names_all_that_one_pass_has():
    public = {name for name in dir(AttentionMaps(((),), (), None, 1)) if not name.startswith("_")}
    assert public - {"load"} <= set(dir(Recording))


def test_types_need_no_torch():
    code = "import sys, dinov2_attn.typing; sys.exit('torch' in sys.modules)"
    assert python("-c", code, cwd=ROOT).returncode == 0


# grafted()


class Around(nn.Module):
    def __init__(self, *inner):
        super().__init__()
        self.inner = nn.ModuleList(inner)


def test_grafted_returns_the_model_itself(models):
    model = build(models)
    assert dinov2_attn.grafted(model) is model
    compiled = torch.compile(model)
    assert dinov2_attn.grafted(compiled) is compiled


def test_grafted_finds_the_transformer_inside(models):
    model = build(models)
    assert dinov2_attn.grafted(Around(nn.Linear(1, 1), model)) is model
    with pytest.raises(InvalidInputError, match=r"2: inner\.0, inner\.1"):
        dinov2_attn.grafted(Around(model, build(models)))


def test_grafted_names_what_to_do_and_that_helps():
    model = build(WITH_MODELS[0])
    for some in (model, Around(model), nn.Linear(1, 1)):
        with pytest.raises(NotGraftedError, match=r"dinov2_attn\.install\(model\)"):
            dinov2_attn.grafted(some)
    with dinov2_attn.install(model):
        assert dinov2_attn.grafted(Around(model)) is model


@pytest.mark.parametrize("wrong", [None, "dinov2_vits14", torch.zeros(1), nn.Linear])
def test_grafted_takes_a_model(wrong):
    with pytest.raises(InvalidInputError, match="Pass the model"):
        dinov2_attn.grafted(wrong)
