"""``dinov2-attn doctor``: what it says is what is."""

from __future__ import annotations

import os

import pytest

from tests.support import subprocesses, upstreams

PATH = upstreams.CHECKOUT or upstreams.fetch_wheel(upstreams.FIRST.wheel)


def doctor(folder, *path):
    found = os.pathsep.join([*map(str, path), str(PATH), os.environ.get("PYTHONPATH", "")])
    return subprocesses.python("-m", "dinov2_attn", "doctor", cwd=folder, PYTHONPATH=found)


def test_without_xformers_everything_is_pytorchs(tmp_path):
    (tmp_path / "xformers.py").write_text("raise ImportError('hidden for this test')")
    done = doctor(tmp_path, tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert said.startswith("OK: demo, heatmap, figure, explore and extract work on cpu in float32")
    assert "(installed)" in said
    assert "grafted: dinov2.layers.attention.MemEffAttention.forward" in said
    assert "attention and blocks as in " in said
    assert "dinov2.layers.attention.XFORMERS_AVAILABLE is False" in said
    assert "dinov2.layers.block.XFORMERS_AVAILABLE is False" in said
    assert "PyTorch's kernel, float32 on cpu: works" in said
    assert "xFormers on cpu: ImportError: hidden for this test" in said
    assert "would fail: upstream's own forward of a list" in said


def test_with_xformers_each_operator_is_tried(tmp_path):
    if subprocesses.python("-c", "import xformers.ops", cwd=tmp_path).returncode:
        pytest.skip("xFormers is not installed: the test above runs without")
    done = doctor(tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "dinov2.layers.attention.XFORMERS_AVAILABLE is True" in said
    assert "grafted: dinov2.layers.attention.memory_efficient_attention" in said
    assert "xFormers' nested kernel, float32 on cpu: NotImplementedError: No operator" in said
    assert "would fail: lists in training with a drop path above 0" in said
    assert "without install(), which adds a fallback" in said


def test_a_library_that_is_missing_is_in_the_verdict(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as it\n"
        "find = it.find_spec\n"
        "it.find_spec = lambda name, *rest: None if name == 'tqdm' else find(name, *rest)\n"
    )
    done = doctor(tmp_path, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OK in Python on cpu. Commands lack tqdm: run `pip install")


def test_code_that_is_refused_ends_in_an_error_of_ours(tmp_path):
    layers = tmp_path / "dinov2" / "layers"
    layers.mkdir(parents=True)
    for file in (layers / "__init__.py", layers.parent / "__init__.py"):
        file.touch()
    done = subprocesses.python("-m", "dinov2_attn", "doctor", "--repo", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("dinov2-attn: error: Expected ")
    assert "Traceback" not in done.stderr
