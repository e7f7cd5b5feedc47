"""Memory that serves one result after another belongs to one of them at a time."""

from __future__ import annotations

import copy
import gc
import io
import mmap
import os
import pickle
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch.utils import dlpack

import dinov2_attn
from dinov2_attn.math import buffers
from dinov2_attn.math.buffers import is_fresh, new_result, release_memory
from tests.support.recordings import is_explicit
from tests.support.strategies import ModelCase
from tests.support.tolerances import assert_close, assert_same_bits, same_bits

LIKE = torch.zeros(1)

# What a user may keep of a result that is that result still.
KEEPS = {
    "itself": lambda weights: weights,
    "a row": lambda weights: weights[..., 0, :],
    "a view of a view": lambda weights: weights.flatten()[3:].detach(),
    "an array": lambda weights: weights.numpy(),
    "a view of an array": lambda weights: weights.numpy()[..., 1:],
    "a tensor of an array": lambda weights: torch.from_numpy(weights.numpy()),
    "a storage": lambda weights: weights.untyped_storage(),
    "a tensor of a storage": lambda weights: torch.empty(0).set_(weights.untyped_storage()),
    "a capsule": dlpack.to_dlpack,
    "a tensor of a capsule": lambda weights: dlpack.from_dlpack(dlpack.to_dlpack(weights)),
    "memory": lambda weights: memoryview(weights.numpy()),
    "its data": lambda weights: weights.data,
    "a parameter": lambda weights: torch.nn.Parameter(weights),
    "a cycle": lambda weights: _cycle(weights),
}

# What a user may make of a result, which is no longer that result.
COPIES = {
    "a clone": lambda weights: weights.clone(),
    "a deep copy": copy.deepcopy,
    "a pickle": lambda weights: pickle.loads(pickle.dumps(weights)),
    "a saved one": lambda weights: _saved(weights),
    "a shared one": lambda weights: weights.share_memory_(),
    "another dtype": lambda weights: weights.double(),
    "nothing": lambda weights: None,
}


def _cycle(weights):
    cycle = [weights]
    cycle.append(cycle)
    return cycle


def _saved(weights):
    file = io.BytesIO()
    torch.save(weights, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _read(kept):
    """Return the numbers in what was kept."""
    if isinstance(kept, torch.Tensor):
        return kept.detach().flatten()
    if isinstance(kept, list):
        return kept[0].flatten()
    if isinstance(kept, torch.UntypedStorage):
        return torch.empty(0).set_(kept)
    if isinstance(kept, memoryview):
        return torch.frombuffer(kept, dtype=torch.float32)
    if type(kept).__name__ == "PyCapsule":
        return dlpack.from_dlpack(kept)  # once
    return torch.from_numpy(kept.copy()).flatten()


@pytest.fixture(autouse=True)
def _a_page_is_large(monkeypatch):
    monkeypatch.setattr(buffers, "_LARGE", 1)
    release_memory()
    yield
    release_memory()


class Memory(RuleBasedStateMachine):
    """Results are made, kept, copied and dropped in any order. Each has a number of its own."""

    def __init__(self):
        super().__init__()
        self.kept = []
        self.number = 0

    def _new(self, rows, columns):
        self.number += 1
        return new_result(LIKE, (2, rows, columns)).fill_(self.number), float(self.number)

    @rule(rows=st.integers(1, 9), columns=st.integers(3, 9), how=st.sampled_from(sorted(KEEPS)))
    def keep(self, rows, columns, how):
        result, number = self._new(rows, columns)
        self.kept.append((KEEPS[how](result), number, how))

    @rule(rows=st.integers(1, 9), columns=st.integers(3, 9), how=st.sampled_from(sorted(COPIES)))
    def copied(self, rows, columns, how):
        result, number = self._new(rows, columns)
        made = COPIES[how](result)
        if made is not None:
            self.kept.append((made.float(), number, how))

    @rule(place=st.integers(0, 99))
    def drop(self, place):
        if self.kept:
            self.kept.pop(place % len(self.kept))

    @rule()
    def release(self):
        release_memory()

    @rule()
    def collect(self):
        gc.collect()

    @invariant()
    def nothing_is_overwritten(self):
        for place, (kept, number, how) in enumerate(self.kept):
            if how == "a capsule":  # it can be read once
                self.kept[place] = (dlpack.from_dlpack(kept), number, "a tensor of a capsule")
            values = _read(self.kept[place][0])
            assert_same_bits(values, torch.full_like(values, number), how)

    def teardown(self):
        self.kept.clear()
        gc.collect()
        release_memory()


TestMemory = Memory.TestCase
TestMemory.settings = settings(max_examples=30, stateful_step_count=25)


@pytest.mark.parametrize("how", sorted(KEEPS))
def test_memory_is_lent_again_when_the_last_reference_is_gone(how):
    first = new_result(LIKE, (3, 50))
    address = first.data_ptr()
    kept = KEEPS[how](first)
    del first
    assert new_result(LIKE, (3, 50)).data_ptr() != address
    if how == "a capsule":
        kept = dlpack.from_dlpack(kept)
    del kept
    gc.collect()
    # The other result of this test came back before it.
    two = [new_result(LIKE, (3, 50)) for _ in range(2)]
    assert address in [one.data_ptr() for one in two]


@pytest.mark.parametrize("how", sorted(COPIES))
def test_a_copy_does_not_hold_the_memory(how):
    first = new_result(LIKE, (3, 50)).fill_(1)
    address = first.data_ptr()
    made = COPIES[how](first)
    del first
    again = new_result(LIKE, (3, 50)).fill_(2)
    assert again.data_ptr() == address
    assert made is None or (made == 1).all()


def test_results_of_one_size_live_side_by_side():
    together = [new_result(LIKE, (6,)).fill_(number) for number in range(4)]
    assert [float(one[0]) for one in together] == [0, 1, 2, 3]
    assert len({one.data_ptr() for one in together}) == 4


def test_similar_sizes_and_other_dtypes_share_memory():
    address = new_result(LIKE, (4, 250)).data_ptr()
    assert new_result(LIKE, (4, 249)).data_ptr() == address
    assert new_result(LIKE, (4, 125), torch.float64).data_ptr() == address
    assert new_result(LIKE, (4, 500), torch.bfloat16).data_ptr() == address


@given(size=st.integers(1, 2**40))
def test_sizes_grow_by_an_eighth_at_most(size):
    rounded = buffers._rounded(size)
    assert size <= rounded <= size * 9 / 8
    assert buffers._rounded(rounded) == rounded


def test_between_a_size_and_its_double_there_are_eight():
    assert {buffers._rounded(size) for size in range(1025, 2049)} == set(range(1152, 2049, 128))


def test_a_result_is_no_view():
    result = new_result(LIKE, (3, 4))
    assert result._base is None
    assert result.shape == (3, 4)
    assert result.is_contiguous()
    result.requires_grad_()
    assert result.is_leaf


def test_its_memory_cannot_grow():
    """As that of an array. It raises, and nothing is overwritten."""
    result = new_result(LIKE, (3, 4)).fill_(5)
    with pytest.raises(RuntimeError, match="resiz"):
        result.resize_(99, 99)
    del result
    smaller = new_result(LIKE, (3, 4)).fill_(5).resize_(2, 3)
    assert (smaller == 5).all()


def test_released_memory_is_counted():
    held = new_result(LIKE, (1000,))
    assert release_memory() == 0
    del held
    assert 4000 <= buffers._KEPT.bytes() <= 4500
    assert 4000 <= release_memory() <= 4500
    assert buffers._KEPT.bytes() == 0


def test_smaller_sizes_of_before_go_first_as_well_as_larger_ones(monkeypatch):
    small, large = buffers._rounded(2000), buffers._rounded(4000)
    monkeypatch.setattr(buffers, "most_kept", lambda: large + small)
    old = [new_result(LIKE, (1000,)) for _ in range(2)]
    new = [new_result(LIKE, (500,)) for _ in range(3)]
    del old
    assert buffers._KEPT.bytes() == large
    del new
    assert buffers._KEPT.bytes() == 3 * small
    assert not buffers._KEPT._free[large]
    assert release_memory() == 3 * small


def test_what_is_kept_is_bounded_and_other_sizes_go_first(monkeypatch):
    monkeypatch.setattr(buffers, "most_kept", lambda: 10_000)
    old = [new_result(LIKE, (500,)) for _ in range(3)]
    new = [new_result(LIKE, (1000,)) for _ in range(4)]
    del old
    assert buffers._KEPT.bytes() == 3 * buffers._rounded(2000)
    del new
    assert set(buffers._KEPT._free) >= {buffers._rounded(4000)}
    assert len(buffers._KEPT._free[buffers._rounded(4000)]) == 2
    assert not buffers._KEPT._free[buffers._rounded(2000)]


def test_one_result_above_the_bound_is_not_kept(monkeypatch):
    monkeypatch.setattr(buffers, "most_kept", lambda: 10_000)
    new_result(LIKE, (10_000,))
    assert buffers._KEPT.bytes() == 0


def test_nothing_is_kept_when_python_ends():
    kept = buffers._Kept()
    free, held = kept.lend(1000), kept.lend(1000)
    del free
    assert kept.bytes() >= 1000
    kept.close()
    del held
    assert kept.bytes() == 0


def test_the_bound_is_a_share_of_the_memory(monkeypatch):
    buffers.most_kept.cache_clear()
    assert 0 < buffers.most_kept() <= 2**31
    buffers.most_kept.cache_clear()
    monkeypatch.setattr(os, "sysconf", lambda name: 2**13)
    assert buffers.most_kept() == 2**23
    buffers.most_kept.cache_clear()
    monkeypatch.delattr(os, "sysconf")
    assert buffers.most_kept() == 2**31
    buffers.most_kept.cache_clear()


def test_threads_have_memory_of_their_own():
    wrong = []

    def work(number):
        kept = []
        for turn in range(200):
            result = new_result(LIKE, (40, 7)).fill_(number)
            kept = [*kept[-2:], result] if turn % 3 else []
            wrong.extend(
                one for one in [result, *kept] if not same_bits(one, torch.full_like(one, number))
            )

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_a_copy():
    held, free = new_result(LIKE, (5000,)).fill_(1), new_result(LIKE, (5000,)).fill_(2)
    del free
    if not (child := os.fork()):  # no test code may run on in it
        own = new_result(LIKE, (5000,)).fill_(3)
        held.fill_(4)
        os._exit(0 if (own == 3).all() and (held == 4).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (held == 1).all()


def test_a_small_result_has_the_dtype_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(buffers, "_LARGE", 1000)
    for count in (3, 300):
        assert new_result(LIKE, (count,)).dtype == torch.float32
        assert new_result(LIKE, (count,), torch.float64).dtype == torch.float64


def test_memory_is_on_the_cpu_whatever_device_is_the_default():
    with torch.device("meta"):
        result = new_result(LIKE, (1000,))
    assert (result.fill_(3) == 3).all()
    assert buffers._Block(1000)._owner.nbytes == 1000


def test_an_inference_tensor_is_one():
    with torch.inference_mode():
        assert new_result(LIKE, (3,)).is_inference()
    assert not new_result(LIKE, (3,)).is_inference()


def test_empty_and_meta_tensors_take_no_memory_of_the_cpu():
    assert new_result(LIKE, (0, 3)).shape == (0, 3)
    assert new_result(LIKE.to("meta"), (3, 2**22)).is_meta


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
    monkeypatch.setattr(buffers, "_LARGE", result.nbytes)
    assert not is_fresh(result)
    assert is_fresh(result.to("meta"))


def test_where_pages_cannot_be_asked_all_is_fresh(monkeypatch):
    monkeypatch.setattr(buffers, "_of_libc", lambda name: None)
    assert is_fresh(torch.zeros(2**10))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asked of Linux")
def test_memory_that_is_lent_again_is_not_fresh():
    new_result(LIKE, (3, 2**22)).fill_(7.0)
    assert not is_fresh(new_result(LIKE, (2**22, 3)))


def test_huge_pages_are_requested_for_pages_that_are_not_shared(monkeypatch):
    asked = []
    monkeypatch.setattr(buffers, "_of_libc", lambda name: lambda *what: asked.append((name, *what)))
    result = new_result(LIKE, (2**20,))  # as many bytes as ask for them, no more
    ((name, start, length, advice),) = asked
    assert (name, advice) == ("madvise", 14)
    assert start % mmap.PAGESIZE == length % mmap.PAGESIZE == 0
    end = result.data_ptr() + 2**22
    assert 0 <= start - result.data_ptr() < mmap.PAGESIZE
    assert 0 <= end - (start + length) < mmap.PAGESIZE
    del result
    assert asked[1:] == [("madvise", start, length, 8)]  # may be taken while nobody has it


def case_of(depth):
    return ModelCase(depth, 0, 2, 2, (3, 4), 2, torch.float32, 0)


KEPT_BY_REDUCE = {
    "themselves": lambda weights: weights,
    "a row": lambda weights: weights[:, :, 0],
    "a view of a view": lambda weights: weights.flatten(1)[:, 3:].detach(),
    "an array": lambda weights: torch.from_numpy(weights.numpy()),
    "a copy": lambda weights: weights.clone(),
    "nothing": lambda weights: None,
}


@given(kept=st.lists(st.sampled_from(sorted(KEPT_BY_REDUCE)), min_size=8, max_size=8))
def test_a_tensor_kept_by_reduce_is_never_overwritten(models, kept):
    case = case_of(8)
    model = case.build(models)
    with torch.no_grad():
        expected = model.get_self_attention(case.images)
        with dinov2_attn.record(model, reduce=lambda i, w: KEPT_BY_REDUCE[kept[i]](w)) as maps:
            model(case.images)
    for name, found, whole in zip(kept, maps.weights, expected, strict=True):
        if name != "nothing":
            assert_close(found, KEPT_BY_REDUCE[name](whole))


@pytest.mark.parametrize("name", sorted(KEPT_BY_REDUCE))
def test_layers_share_memory_that_is_not_kept(models, name):
    case, seen = case_of(4), []
    model = case.build(models)
    if is_explicit(model):
        pytest.skip("explicit code makes its own matrices; copies with a fused kernel run")

    def reduce(layer, weights):
        seen.append(weights.data_ptr())
        return KEPT_BY_REDUCE[name](weights)

    with torch.no_grad(), dinov2_attn.record(model, reduce=reduce):
        model(case.images)
    assert len(set(seen)) == (1 if name in ("a copy", "nothing") else 4)


@torch.no_grad()
def test_a_loop_writes_to_the_same_memory(models):
    case = case_of(4)
    model = case.build(models)
    if is_explicit(model):
        pytest.skip("explicit code makes its own matrices; copies with a fused kernel run")
    seen, before = [], None
    for number in range(4):
        with dinov2_attn.record(model) as maps:
            model(case.images + number)
        seen.append({one.data_ptr() for one in maps.weights})
        before = [one.clone() for one in maps.weights] if before is None else before
        del maps
    assert seen[1:] == seen[1:2] * 3
    with dinov2_attn.record(model) as maps:
        model(case.images)
    for one, again in zip(before, maps.weights, strict=True):
        assert_same_bits(one, again)


def test_weights_outlive_the_recording(models):
    case = case_of(2)
    model = case.build(models)
    with torch.no_grad():
        expected = model.get_self_attention(case.images)
        with dinov2_attn.record(model, reduce=lambda _, weights: weights[:, :, 1:]) as maps:
            model(case.images)
        found = list(maps.weights)
        del maps
        for _ in range(3):  # if the memory were free, its next owner would overwrite it
            new_result(expected[0], expected[0].shape).fill_(-1.0)
    for one, whole in zip(found, expected, strict=True):
        assert_close(one, whole[:, :, 1:])
