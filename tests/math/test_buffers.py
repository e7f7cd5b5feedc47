"""Memory that serves one layer after another belongs to one result at a time."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dinov2_attn
from dinov2_attn.math import buffers
from dinov2_attn.math.buffers import Preallocated, ReusableBuffer, is_fresh
from tests.support.recordings import is_explicit
from tests.support.strategies import ModelCase
from tests.support.tolerances import assert_close

# What a user may keep of a layer's weights that is those weights still.
KEEPS = {
    "themselves": lambda weights: weights,
    "a row": lambda weights: weights[:, :, 0],
    "a view of a view": lambda weights: weights.flatten(1)[:, 3:].detach(),
    "an array": lambda weights: torch.from_numpy(weights.numpy()),
    "a storage": lambda weights: _of_storage(weights, weights.untyped_storage()),
    "a copy": lambda weights: weights.clone(),
    "nothing": lambda weights: None,
}


def case_of(depth):
    return ModelCase(depth, 0, 2, 2, (3, 4), 2, torch.float32, 0)


def _of_storage(weights, storage):
    return torch.empty(0).set_(storage, 0, weights.shape)


@pytest.fixture(autouse=True)
def _a_page_is_large(monkeypatch):
    monkeypatch.setattr(buffers, "_LARGE", 1)


@given(kept=st.lists(st.sampled_from(sorted(KEEPS)), min_size=8, max_size=8))
def test_a_tensor_kept_by_reduce_is_never_overwritten(models, kept):
    case = case_of(8)
    model = case.build(models)
    with torch.no_grad():
        expected = model.get_self_attention(case.images)
        with dinov2_attn.record(model, reduce=lambda i, w: KEEPS[kept[i]](w)) as maps:
            model(case.images)
    for name, found, whole in zip(kept, maps.weights, expected, strict=True):
        if name != "nothing":
            assert_close(found, KEEPS[name](whole))


@pytest.mark.parametrize("name", sorted(KEEPS))
def test_layers_share_memory_that_is_not_kept(models, name):
    case, seen = case_of(4), []
    model = case.build(models)
    if is_explicit(model):
        pytest.skip("explicit code makes its own matrices; copies with a fused kernel run")

    def reduce(layer, weights):
        seen.append(weights.data_ptr())
        return KEEPS[name](weights)

    with torch.no_grad(), dinov2_attn.record(model, reduce=reduce):
        model(case.images)
    assert len(set(seen)) == (1 if name in ("a copy", "nothing") else 4)


def test_tensors_of_one_list_live_side_by_side():
    """And those of the next layer lie where they lay."""
    scratch, like, seen = ReusableBuffer(), torch.zeros(1), []
    for _ in range(4):
        together = [scratch.allocate(like, shape) for shape in ((2, 3), (7,), (4, 5))]
        seen.append([tensor.data_ptr() for tensor in together])
        assert len(set(seen[-1])) == 3
        del together
    assert seen == [seen[0]] * 4


def test_tensors_of_one_size_live_side_by_side_too():
    scratch, like = ReusableBuffer(), torch.zeros(1)
    for _ in range(3):
        first, second = (scratch.allocate(like, (6,)) for _ in range(2))
        first.fill_(1.0)
        second.fill_(2.0)
        assert (first == 1).all()
        del first, second


def test_sizes_that_no_longer_come_are_let_go():
    scratch, like = ReusableBuffer(), torch.zeros(1)
    for size in range(2, 50):
        scratch.allocate(like, (size,))
    assert len(scratch._lent) == 1


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="asked of Linux: else all is fresh"
)
def test_fresh_is_what_was_never_written(monkeypatch):
    monkeypatch.undo()
    # Not from an allocator: another tensor may use its memory.
    # What lies behind is never written here.
    result = torch.frombuffer(mmap.mmap(-1, 2**25), dtype=torch.float32)[: 2**22].view(4, -1)
    assert is_fresh(result)
    result.zero_()
    assert not is_fresh(result)
    assert not is_fresh(result[2:])
    assert is_fresh(torch.zeros(4))  # too small to matter
    assert is_fresh(result.to("meta"))


def test_huge_pages_are_requested_for_pages_that_are_not_shared(monkeypatch):
    asked = []
    monkeypatch.setattr(buffers, "_of_libc", lambda name: lambda *what: asked.append((name, *what)))
    result = buffers.new_result(torch.zeros(1), (2**21,))
    ((name, start, length, advice),) = asked
    assert (name, advice) == ("madvise", 14)
    assert start % mmap.PAGESIZE == length % mmap.PAGESIZE == 0
    end = result.data_ptr() + 2**23
    assert 0 <= start - result.data_ptr() < mmap.PAGESIZE
    assert 0 <= end - (start + length) < mmap.PAGESIZE


def test_memory_that_is_lent_again_is_not_fresh():
    scratch, like = ReusableBuffer(), torch.zeros(1)
    kept = scratch.allocate(like, (3, 2**22)).fill_(7.0)
    second = scratch.allocate(like, (3, 2**22)).fill_(8.0)
    address = second.data_ptr()
    del second
    assert scratch.allocate(like, (2**22, 3)).data_ptr() == address
    assert (kept == 7).all()


def test_empty_and_meta_tensors_are_always_allocated():
    """The empty has none, and a device's cannot be looked into."""
    scratch, like = ReusableBuffer(), torch.zeros(1)
    assert scratch.allocate(like, (0, 3)).shape == (0, 3)
    assert scratch.allocate(like.to("meta"), (3, 2**22)).is_meta


def test_weights_outlive_the_recording(models):
    case = case_of(2)
    model = case.build(models)
    with torch.no_grad():
        expected = model.get_self_attention(case.images)
        with dinov2_attn.record(model, reduce=lambda _, weights: weights[:, :, 1:]) as maps:
            model(case.images)
        found = list(maps.weights)
        del maps
        for _ in range(3):  # if the buffer were free, its next owner would overwrite it
            torch.full(expected[0].shape, -1.0)
    for one, whole in zip(found, expected, strict=True):
        assert_close(one, whole[:, :, 1:])


def test_what_is_set_aside_is_lent_once():
    aside, like = Preallocated(3), torch.zeros(1)
    lent = [aside.allocate(like, shape) for shape in ((2, 5), (4,), (2, 5), (2, 5), (2, 5))]
    assert [tuple(one.shape) for one in lent] == [(2, 5), (4,), (2, 5), (2, 5), (2, 5)]
    assert len({one.data_ptr() for one in lent}) == len(lent)
    assert aside.allocate(like.double(), (4,)).dtype == torch.float64


@torch.no_grad()
def test_what_is_kept_of_all_layers_is_set_aside_with_the_first(models, monkeypatch):
    case, made, seen = case_of(4), [], []
    model, plain = case.build(models), buffers.new_result
    if is_explicit(model):
        pytest.skip("explicit code makes its own matrices; copies with a fused kernel run")

    def watched(like, shape):
        made.append(shape)
        return plain(like, shape)

    monkeypatch.setattr(buffers, "new_result", watched)
    model.blocks[0].register_forward_hook(lambda *_: seen.append(len(made)))
    with dinov2_attn.record(model):
        model(case.images)
    assert seen == [4]
    assert len(made) == 4


def test_as_much_is_set_aside_as_there_are_layers(monkeypatch):
    made, new_result = [], buffers.new_result
    monkeypatch.setattr(
        buffers, "new_result", lambda like, shape: made.append(shape) or new_result(like, shape)
    )
    aside = Preallocated(3)
    lent = [aside.allocate(torch.zeros(1), (2, 5)) for _ in range(3)]
    assert len(made) == len(lent)
