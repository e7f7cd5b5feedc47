"""What every result answers: one line, a table, a picture, devices, arrays, files, equality."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import warnings
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinov2_attn import ArtifactTokens, AttentionMaps, Recording, attention_maps, record
from dinov2_attn.errors import InvalidInputError, UnreadableFileError
from dinov2_attn.maps.rollout import Rollout
from tests.support.recordings import IMAGES, build
from tests.support.subprocesses import python
from tests.support.tolerances import assert_same_bits

KINDS = (AttentionMaps, Rollout, ArtifactTokens)
PNG = b"\x89PNG\r\n\x1a\n"

dtypes = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
grids = st.tuples(st.integers(1, 5), st.integers(1, 5))


@st.composite
def results(draw, kinds=KINDS, least=0):
    """A result of random shape and numbers, NaN and infinity among them."""
    kind, grid, prefix = draw(st.sampled_from(kinds)), draw(grids), draw(st.integers(1, 5))
    batch, dtype = draw(st.integers(least, 3)), draw(dtypes)
    length = prefix + grid[0] * grid[1]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def noise(*shape):
        values = torch.rand(shape, generator=generator)
        return torch.where(values > 0.95, draw(st.sampled_from([np.nan, np.inf, 1.0])), values)

    if kind is ArtifactTokens:
        maps = [noise(batch, *grid).to(dtype) for _ in range(3)]
        masks = [noise(batch, *grid) > 0.5 for _ in range(3)]
        layer = torch.randint(0, 40, (batch,), generator=generator)
        threshold = noise(batch).to(dtype)
        return ArtifactTokens(masks[0], maps[0], layer, threshold, *maps[1:], *masks[1:])
    rows = st.lists(st.integers(0, length - 1), min_size=least, max_size=9)
    queries = draw(st.none() | rows.map(tuple))
    count = length if queries is None else len(queries)
    if kind is Rollout:
        return Rollout(noise(batch, count, length).to(dtype), grid, prefix, queries)
    layers = draw(st.lists(st.integers(0, 39), min_size=least, max_size=12, unique=True).map(tuple))
    heads = draw(st.sampled_from([(), (2,)]))
    weights = tuple(noise(batch, *heads, count, length).to(dtype) for _ in layers)
    grid = draw(st.sampled_from([grid, grid if least else None]))
    return AttentionMaps(weights, layers, grid, prefix, queries)


def recording_of(*entries):
    recording = Recording()
    recording.passes += entries
    return recording


def parts_of(result):
    return [getattr(result, f.name) for f in dataclasses.fields(result)]


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    for a, b in zip(parts_of(ours), parts_of(theirs), strict=True):
        if isinstance(b, torch.Tensor) or (isinstance(b, tuple) and b and torch.is_tensor(b[0])):
            assert_same_bits(a, b)
        else:
            assert a == b


# One line


@given(result=results(), reduced=st.sampled_from([1.5, "two\nlines", {"a": 1}, (1, 2), None]))
def test_any_result_is_one_line(result, reduced):
    for one in (result, result.numpy(), recording_of(), recording_of(result), [result]):
        if isinstance(result, AttentionMaps) or not isinstance(one, Recording):
            assert len(repr(one).splitlines()) == 1
            assert len(repr(one)) < 500
    assert repr(result).startswith(f"{type(result).__name__}(")
    if isinstance(result, AttentionMaps):
        kept = dataclasses.replace(result, weights=(reduced,))
        assert f"weights={type(reduced).__name__}, " in repr(kept)
        assert len(repr(recording_of(result, kept)).splitlines()) == 1


def test_lines_word_by_word():
    maps = AttentionMaps((torch.rand(1, 6, 1, 1374),) * 12, tuple(range(12)), (37, 37), 5, (0,))
    facts = "layers=0–11, weights=(1, 6, 1, 1374), grid=37×37, prefix=5, queries=[CLS]"
    assert repr(maps) == f"AttentionMaps({facts})"
    assert repr(recording_of(maps)) == f"Recording(passes=1, {facts})"
    other = dataclasses.replace(maps, queries=(1, 5, 42, 6, 7))
    assert repr(other).endswith(
        "queries=[register 1, patch (0, 0), patch (1, 0), patch (0, 1), and 1 more])"
    )
    assert repr(recording_of(maps, other)).endswith(", prefix=5, queries=various)")
    assert repr(recording_of()) == "Recording(passes=0)"
    every = dataclasses.replace(maps, queries=tuple(range(1374)))
    assert repr(every).endswith("queries=all)")
    without = AttentionMaps((1.0, 2.0), (3, 5), None, 1, (0, 4))
    facts = "layers=3, 5, weights=float, grid=unknown, prefix=1, queries=[CLS, #4]"
    assert repr(without) == f"AttentionMaps({facts})"
    rollout = Rollout(torch.rand(2, 1, 7), (2, 3), 1, (0,))
    assert repr(rollout) == "Rollout(weights=(2, 1, 7), grid=2×3, prefix=1, queries=[CLS])"
    mask = torch.tensor([[[True, False, True]], [[False] * 3]])
    layer = torch.tensor([7, 8])
    found = ArtifactTokens(mask, *[mask.float()], layer, layer.float(), *[mask.float()] * 4)
    assert repr(found) == "ArtifactTokens(images=2, grid=1×3, layer=[7, 8], tokens=[2, 0])"
    assert repr(found.to("meta")).endswith("layer=unknown, tokens=unknown)")


# In a notebook


@given(result=results())
def test_a_notebook_shows_a_table_of_the_same_facts(result):
    text = result._repr_html_()
    table = ElementTree.fromstring(re.sub(r"(<img[^>]*)>", r"\1/>", f"<div>{text}</div>"))
    rows = {row[0].text: row[1].text for row in table.iter("tr")}
    listed = ", ".join(f"{name}={fact}" for name, fact in rows.items())
    assert repr(result) == f"{table.find('.//caption').text}({listed})"
    assert (table.find("img") is not None) == (result._repr_png_() is not None)


def test_a_table_is_escaped():
    named = AttentionMaps((type("<script>", (), {})(),), (0,), None, 1)
    assert "&lt;script&gt;" in named._repr_html_()
    assert "<script>" not in named._repr_html_()


@given(result=results(least=1), arrays=st.booleans())
def test_a_notebook_shows_a_picture(result, arrays):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = (result.numpy() if arrays else result)._repr_png_()
    if picture is not None:
        assert picture.startswith(PNG)
    parts = [part for part in parts_of(result) if isinstance(part, torch.Tensor)]
    weights = [*parts, *getattr(result, "weights", ())]
    if all(part.isfinite().all() for part in weights if isinstance(part, torch.Tensor)):
        assert picture is not None


def test_what_cannot_be_drawn_has_no_picture():
    maps = AttentionMaps((torch.rand(1, 1, 7),), (0,), (2, 3), 1)
    assert maps._repr_png_().startswith(PNG)
    assert recording_of(maps)._repr_png_().startswith(PNG)
    assert recording_of(maps, maps)._repr_png_() is None
    assert recording_of()._repr_png_() is None
    for change in ({"weights": (1.0,)}, {"weights": ()}, {"grid": None}, {"grid": (5, 5)}):
        assert dataclasses.replace(maps, **change)._repr_png_() is None
    assert maps.to("meta")._repr_png_() is None


def test_without_matplotlib_there_is_a_table_and_no_picture(tmp_path):
    code = """
import sys, torch
sys.modules["matplotlib"] = None
from dinov2_attn import AttentionMaps
maps = AttentionMaps((torch.rand(1, 1, 7),), (0,), (2, 3), 1)
assert maps._repr_png_() is None
assert maps._repr_html_().startswith("<table>") and "<img" not in maps._repr_html_()
"""
    done = python("-W", "error::UserWarning:dinov2_attn", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_line_imports_no_pictures(tmp_path):
    code = """
import sys, torch
from dinov2_attn import AttentionMaps
repr(AttentionMaps((torch.rand(1, 1, 7),), (0,), (2, 3), 1))
sys.exit(any(name.startswith(("matplotlib", "dinov2_attn.apps")) for name in sys.modules))
"""
    assert python("-c", code, cwd=tmp_path).returncode == 0


# Devices and arrays


@given(result=results())
def test_a_result_moves_as_a_whole(result):
    assert_same(result.to("cpu"), result)
    assert_same(result.to(torch.device("cpu")).cpu(), result)
    there = result.to("meta")
    for part in parts_of(there):
        for tensor in part if isinstance(part, tuple) else [part]:
            assert not isinstance(tensor, torch.Tensor) or tensor.is_meta
    for again in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert_same(again, result)


def test_gradients_flow_through_to_and_end_at_cpu():
    weights = torch.rand(1, 1, 7, requires_grad=True)
    for result in (AttentionMaps((weights * 1,), (0,), (2, 3), 1), Rollout(weights * 1, (2, 3), 1)):
        (moved,) = result.to("cpu")._tensors().values()
        assert moved.requires_grad
        (moved,) = result.cpu()._tensors().values()
        assert not moved.requires_grad


@given(result=results())
def test_arrays_hold_the_same_numbers_in_every_field(result):
    arrays = result.numpy()
    for name, part in result._tensors().items():
        array = arrays._tensors()[name]
        assert isinstance(array, np.ndarray)
        assert_same_bits(torch.from_numpy(array).to(part.dtype), part)
        assert arrays.cpu()._tensors()[name] is array
    if isinstance(result, ArtifactTokens):
        assert repr(arrays) == repr(result)
        assert len(arrays.report()) == len(arrays.describe()) == len(result.mask)


def test_what_reduce_nested_moves_too():
    nested = ({"a": [torch.rand(1)], "b": (torch.rand(2), 3)},)
    moved = AttentionMaps(nested, (0,), None, 1).to("meta").weights[0]
    assert moved["a"][0].is_meta
    assert moved["b"][0].is_meta
    assert moved["b"][1] == 3


class Pair(NamedTuple):
    one: torch.Tensor
    name: str


def test_named_tuples_of_reduce_are_moved_and_keep_their_names():
    weights = torch.rand(2, 7)
    maps = AttentionMaps(((weights.topk(3), Pair(weights, "w"), weights.shape),), (0,), None, 1)
    largest, pair, shape = maps.to("meta").weights[0]
    assert largest.values.is_meta
    assert largest.indices.is_meta
    assert pair.one.is_meta
    assert (pair.name, shape) == ("w", torch.Size([2, 7]))
    largest, pair, _ = maps.numpy().weights[0]
    assert isinstance(largest.values, np.ndarray)
    assert isinstance(pair.one, np.ndarray)


# Files


@given(result=results())
def test_a_file_gives_back_every_result(tmp_path_factory, result):
    path = tmp_path_factory.mktemp("results") / "some"
    result.save(path)
    assert_same(type(result).load(str(path)), result)
    for kind in KINDS:
        if kind is not type(result):
            words = rf"(?s)that {kind.__name__}\.save wrote.*it holds {type(result).__name__}"
            with pytest.raises(UnreadableFileError, match=words):
                kind.load(path)
    content = path.read_bytes()
    if result._tensors():
        with pytest.raises(InvalidInputError, match=r"before \.numpy"):
            result.numpy().save(path)
    assert path.read_bytes() == content


def test_a_pass_over_a_recording_is_saved_by_its_entries(grafted, tmp_path):
    model = build(grafted)
    with record(model) as maps:
        model(IMAGES)
        model(IMAGES[:1])
    for i, one in enumerate(maps):
        one.save(tmp_path / f"{i}")
        assert_same(AttentionMaps.load(tmp_path / f"{i}"), one.cpu())


# Equality


anything = st.one_of(
    st.none(), st.booleans(), st.floats(), st.text(), st.lists(st.integers()), results()
)


@given(result=results(), other=anything)
def test_equality_with_anything_does_not_raise(result, other):
    for one in (result, result.numpy(), recording_of(result)):
        assert one == one  # noqa: PLR0124
        assert (one == other) is False
        assert (other == one) is False
        assert one != other
        assert one not in [other]
        assert len({one, copy.copy(one)}) == 2


def test_loaded_maps_are_what_was_asked(grafted, tmp_path):
    maps = attention_maps(build(grafted), IMAGES, queries="patches").cpu()
    maps.save(tmp_path / "a")
    assert repr(AttentionMaps.load(tmp_path / "a")) == repr(maps)
