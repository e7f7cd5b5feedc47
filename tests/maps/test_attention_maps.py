"""`attention_maps` and `AttentionMaps`: weights that know their grid."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dinov2_attn
from dinov2_attn import AttentionMaps, attention_maps, record
from dinov2_attn.errors import (
    InvalidInputError,
    UnreadableFileError,
    UnwritableOutputError,
)
from dinov2_attn.math.selection import name_token
from tests.support import layouts
from tests.support.recordings import IMAGES, build
from tests.support.strategies import model_cases, noise
from tests.support.tolerances import are_close, assert_close, assert_same_bits

queries = st.sampled_from([None, "cls", "registers", "patches", -1, [1, 0], slice(None, None, -2)])
heads = st.sampled_from([None, "mean"])


def whole(weights, **other):
    """Maps made by hand: any numbers on any grid."""
    grid = other.pop("grid", (2, 3))
    return AttentionMaps((weights,), (4,), grid, other.pop("prefix", 1), **other)


@given(case=model_cases(), queries=queries, heads=heads)
def test_rows_know_their_grid_whatever_the_aspect_and_the_registers(models, case, queries, heads):
    model = case.build(models)
    maps = attention_maps(model, case.images, queries=queries, heads=heads)
    expected = model.get_self_attention(case.images, queries=queries, heads=heads)
    assert maps.grid == case.grid
    assert maps.prefix == case.prefix(models)
    assert maps.layers == tuple(range(case.depth))
    for weights, ours, shown, held in zip(
        expected, maps.weights, maps.patch_maps(), maps.prefix_mass(), strict=True
    ):
        assert_close(ours, weights)
        assert shown.shape == (*weights.shape[:-1], *case.grid)
        # Every patch, found by its own row and column in plain Python.
        for i in range(case.grid[0]):
            for j in range(case.grid[1]):
                column = maps.prefix + i * case.grid[1] + j
                assert_same_bits(shown[..., i, j], ours[..., column])
        assert_close(shown.sum((-2, -1)) + held, torch.ones_like(held))


@given(case=model_cases(), queries=queries)
def test_rows_know_their_tokens(models, case, queries):
    model = case.build(models)
    maps = attention_maps(model, case.images, layers=1, queries=queries)
    (every,) = attention_maps(model, case.images, layers=1).weights
    assert len(maps.queries) == maps.weights[0].shape[2]
    for row, token in enumerate(maps.queries):
        assert_close(maps.weights[0][:, :, row], every[:, :, token])
    with record(model, 1, queries=queries) as recorded:
        model(case.images)
    assert recorded.queries == maps.queries


@given(case=model_cases(), queries=queries, heads=heads, layers=st.sampled_from([None, 1, [0]]))
def test_a_list_of_batches_gives_what_each_gives(models, case, queries, heads, layers):
    model = case.build(models)
    batches = [case.images, noise(1, 3, 2, 8, seed=3, dtype=case.dtype)]
    mask = torch.arange(math.prod(case.grid))[None].expand(len(case.images), -1) % 2 > 0
    asked = {"layers": layers, "queries": queries, "heads": heads}
    found = attention_maps(model, batches, masks=[mask, None], **asked)
    assert isinstance(found, list)
    assert attention_maps(model, tuple(batches), **asked)[1].grid == (1, 4)
    for ours, batch, own in zip(found, batches, [mask, None], strict=True):
        alone = attention_maps(model, batch, masks=own, **asked)
        for name in ("layers", "grid", "prefix", "queries"):
            assert getattr(ours, name) == getattr(alone, name)
        assert_close(ours.weights, alone.weights)


def test_masks_reach_the_model(grafted):
    model = build(grafted)
    masks = torch.arange(6)[None].expand(2, -1) > 3
    (masked,) = attention_maps(model, IMAGES, 1, masks).weights
    assert_close(masked, model.get_last_self_attention(IMAGES, masks))
    assert not are_close(masked, model.get_last_self_attention(IMAGES))


def test_gradients_flow_when_grad_is_on(grafted):
    model = build(grafted)
    maps = attention_maps(model, IMAGES, 1)
    assert maps.patch_maps()[0].requires_grad
    assert not maps.cpu().weights[0].requires_grad
    with torch.no_grad():
        assert not attention_maps(model, IMAGES, 1).weights[0].requires_grad


@pytest.mark.parametrize("ask", ["patch_maps", "prefix_mass"])
def test_a_token_count_that_does_not_fit_is_an_error_with_the_arithmetic_in_it(ask):
    maps = whole(torch.rand(1, 2, 1, 8), prefix=5)
    with pytest.raises(
        InvalidInputError, match=r"(?s)5 \+ 2 · 3 = 11 columns.*Found.*\(1, 2, 1, 8\)"
    ):
        getattr(maps, ask)()
    with pytest.raises(InvalidInputError, match="Found str"):
        getattr(whole("reduced to words"), ask)()
    with pytest.raises(InvalidInputError, match="no images of whole patches"):
        getattr(whole(torch.rand(1, 2, 1, 7), grid=None), ask)()


def test_what_reduce_kept_is_shown_where_it_kept_the_columns(grafted):
    model = build(grafted)
    with record(model, reduce=lambda _, weights: weights.amax((1, 2))) as maps:
        model(IMAGES)
    assert maps.patch_maps()[0].shape == (2, 2, 3)
    with record(model, reduce=lambda _, weights: weights.mean()) as maps:
        model(IMAGES)
    with pytest.raises(InvalidInputError, match="keep the columns in reduce"):
        maps.patch_maps()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_arrays_hold_the_same_numbers(dtype):
    weights = torch.tensor([1e-30, 0.5, 0.25, 0.125, 0.1, 0.01, 0.015]).to(dtype)
    weights = weights.expand(2, 3, 1, 7).clone().requires_grad_()
    arrays = whole(weights).numpy()
    assert isinstance(arrays.weights[0], np.ndarray)
    assert_same_bits(torch.from_numpy(arrays.weights[0]).to(dtype), weights)
    assert arrays.patch_maps()[0].shape == (2, 3, 1, 2, 3)
    assert arrays.prefix_mass()[0].shape == (2, 3, 1)


# Kept in a file


@given(case=model_cases(), queries=queries, heads=heads)
def test_a_file_gives_back_all_of_it(tmp_path_factory, models, case, queries, heads):
    model = case.build(models)
    maps = attention_maps(model, case.images, queries=queries, heads=heads)
    path = tmp_path_factory.mktemp("maps") / "some.safetensors"
    maps.save(path)
    again = AttentionMaps.load(str(path))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    for name in ("layers", "grid", "prefix", "queries"):
        assert getattr(again, name) == getattr(maps, name)
    for a, b in zip(again.weights, maps.weights, strict=True):
        assert a.dtype == b.dtype
        assert_same_bits(a, b)


def test_rows_of_one_memory_and_grids_that_are_not_known_are_kept_too(tmp_path):
    memory = torch.rand(2, 1, 2, 7, 7).mT
    maps = AttentionMaps((memory[0], memory[1]), (3, 5), None, 1, None)
    maps.save(tmp_path / "a")
    again = AttentionMaps.load(tmp_path / "a")
    assert (again.grid, again.queries, again.layers) == (None, None, (3, 5))
    assert_same_bits(torch.stack(again.weights), memory)
    dataclasses.replace(maps, weights=(memory[0],), layers=(3,)).save(tmp_path / "a")  # replaces
    assert AttentionMaps.load(tmp_path / "a").layers == (3,)


def test_a_file_of_something_else_is_an_error(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    with pytest.raises(UnreadableFileError, match=r"AttentionMaps\.save"):
        AttentionMaps.load(path)
    path.write_bytes(b"\x08" + bytes(7) + b"nonsense")
    with pytest.raises(UnreadableFileError):
        AttentionMaps.load(path)
    save_file({"layer.0": torch.rand(1)}, path)
    with pytest.raises(UnreadableFileError):
        AttentionMaps.load(path)
    whole(torch.rand(1, 2, 1, 7)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadableFileError):
        AttentionMaps.load(path)


def test_a_file_that_lacks_a_layer_says_which(tmp_path):
    from safetensors.torch import save_file

    about = {"layers": "[7]", "grid": "null", "prefix": "1", "queries": "null"}
    save_file({"layer.70.0": torch.rand(1)}, tmp_path / "a", about)
    with pytest.raises(UnreadableFileError, match=r"KeyError: 'layer\.7'"):
        AttentionMaps.load(tmp_path / "a")


def test_a_file_is_finished_beside_its_place(tmp_path, monkeypatch):
    """From the folder for temporary files, which may be another disk, it could not be moved."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "another disk"))
    whole(torch.rand(1, 2, 1, 7)).save(tmp_path / "a")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_nothing_half_written_is_left(tmp_path):
    maps = whole(torch.rand(1, 2, 1, 7))
    with pytest.raises(UnwritableOutputError):
        maps.save(tmp_path / "missing" / "a")
    (tmp_path / "folder" / "in").mkdir(parents=True)
    with pytest.raises(UnwritableOutputError, match=r"(?s)not a file: .*folder'"):
        maps.save(tmp_path / "folder")
    with pytest.raises(InvalidInputError, match=r"before \.numpy.*reduce"):
        maps.numpy().save(tmp_path / "b")
    with pytest.raises(ValueError, match="shorter"):
        dataclasses.replace(maps, layers=(4, 5)).save(tmp_path / "b")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    program = (
        "import sys; from dinov2_attn import AttentionMaps, errors\n"
        "try: AttentionMaps.load(sys.argv[1])\n"
        "except errors.UnreadableFileError: pass\n"
        "else: raise SystemExit('no error')\n"
    )
    # In a process of its own: safetensors lets nothing else run while it waits.
    run = [sys.executable, "-c", program, str(tmp_path / "a.safetensors")]
    subprocess.run(run, check=True, timeout=60)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here: a folder is no file either")
def test_a_pipe_is_not_replaced(tmp_path):
    """Nor is a device: root, as in a container, could take /dev/null from everybody."""
    os.mkfifo(tmp_path / "a")
    with pytest.raises(UnwritableOutputError, match="not a file"):
        whole(torch.rand(1, 2, 1, 7)).save(tmp_path / "a")
    assert (tmp_path / "a").is_fifo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_without_safetensors_everything_but_files_works(tmp_path):
    code = """
import sys, torch
sys.modules["safetensors"] = sys.modules["safetensors.torch"] = None
from dinov2_attn import AttentionMaps
from dinov2_attn.errors import UnavailableError
maps = AttentionMaps((torch.rand(1, 1, 7),), (0,), (2, 3), 1)
assert maps.patch_maps()[0].shape == (1, 1, 2, 3)
for ask in (maps.save, maps.load):
    try:
        ask("a")
    except UnavailableError as error:
        assert "dinov2-attn[viz]" in str(error)
    else:
        raise SystemExit(f"{ask} wrote")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_tokens_have_names():
    assert name_token(0, 5, (2, 3)) == "CLS"
    assert name_token(4, 5, (2, 3)) == "register 4"
    assert name_token(5, 5, (2, 3)) == "patch (0, 0)"
    assert name_token(9, 5, (2, 3)) == "patch (1, 1)"


@pytest.mark.parametrize("count", [1, 3])
def test_registers_behind_the_patches_are_no_patches(grafted, count):
    model = layouts.build(grafted, layouts.registers_behind(grafted, count), depth=2)
    images = noise(2, 3, 4, 6, seed=0, dtype=torch.float32)
    with dinov2_attn.install(model):
        expected = model.get_self_attention(images)
        every = attention_maps(model, images)
        patches = attention_maps(model, images, queries="patches")
        last = attention_maps(model, images, 1, queries=-1)
    for maps in (every, patches):
        assert (maps.grid, maps.prefix, maps.suffix) == ((2, 3), 1, count)
    assert patches.queries == tuple(range(1, 7))
    for ours, theirs in zip(every.weights, expected, strict=True):
        assert_close(ours, theirs)
    for maps, rows in ((every, slice(None)), (patches, slice(1, 7))):
        for shown, theirs in zip(maps.patch_maps(), expected, strict=True):
            assert_close(shown, theirs[:, :, rows, 1:7].unflatten(-1, (2, 3)))
    assert_close(last.weights[0], expected[-1][:, :, -1:])


def test_results_say_where_each_layer_comes_from(grafted, tmp_path):
    model = build(grafted)
    kernel, projection = ("kernel",), ("projection",)
    assert attention_maps(model, IMAGES).sources == kernel * 2 + projection
    assert attention_maps(model, IMAGES, 1).sources == projection
    with record(model, 1) as maps:
        model(IMAGES)
    assert maps.passes[0].sources == kernel
    assert repr(maps.passes[0]).endswith("queries=all, sources=kernel)")
    maps.save(tmp_path / "a.safetensors")
    assert AttentionMaps.load(tmp_path / "a.safetensors").sources == kernel


# Last: they take away the grafts of the tests above


@pytest.mark.parametrize("heads", [None, "mean"])
@pytest.mark.parametrize("queries", [None, "cls", "patches", [3, -1]])
def test_a_model_without_grafts_answers_with_what_its_kernel_was_given(first, queries, heads):
    model, asked = build(first), {"queries": queries, "heads": heads}
    masks = torch.arange(6)[None].expand(2, -1) > 3
    for layers in (None, 1, [0]):
        found = attention_maps(model, IMAGES, layers, masks, **asked)
        assert set(found.sources) == {"kernel"}
        with dinov2_attn.install(model):
            expected = attention_maps(model, IMAGES, layers, masks, **asked)
        for name in ("layers", "grid", "prefix", "queries"):
            assert getattr(found, name) == getattr(expected, name)
        for ours, theirs in zip(found.weights, expected.weights, strict=True):
            assert_close(ours, theirs)


def test_a_module_without_attention_is_an_error():
    with pytest.raises(InvalidInputError, match="Found none in torch.nn.modules.linear.Linear"):
        attention_maps(torch.nn.Linear(1, 1), IMAGES)
    with pytest.raises(InvalidInputError, match="Found str"):
        attention_maps("dinov2", IMAGES)
