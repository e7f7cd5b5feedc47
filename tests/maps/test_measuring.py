"""Statistics of a kernel call are those of its explicit matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2_attn.backbone.layout import Layout
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.kernels.call import ExplicitCall, FusedCall
from dinov2_attn.maps import measuring
from dinov2_attn.maps.measuring import check_statistics, measure
from tests.support.statistics import ALL, assert_statistics, places_of, softmax, statistics
from tests.support.strategies import noise, seeds
from tests.support.tolerances import assert_close, assert_same_bits


@dataclass(frozen=True)
class Case:
    """A call, as numbers, so that failures print well."""

    batch: int
    heads: int
    shared: int  # heads of the query for each of the key
    prefix: int
    grid: tuple[int, int]
    suffix: int
    per_cell: int
    planes: bool
    bias: str
    size: float
    dtype: torch.dtype
    seed: int

    @property
    def layout(self):
        return Layout(self.prefix, self.suffix, self.grid, self.per_cell, self.planes)

    @property
    def places(self):
        return places_of(self.prefix, self.grid, self.suffix, self.per_cell, self.planes)

    def build(self):
        length, heads = self.layout.length, self.heads * self.shared
        query = noise(self.batch, heads, length, 3, seed=self.seed, dtype=self.dtype) * self.size
        key = noise(self.batch, self.heads, length, 3, seed=self.seed + 1, dtype=self.dtype)
        bias, given = self.bias_of(heads, length), self.bias == "causal"
        return FusedCall("", query, key, key, 0.7, bias=bias, is_causal=given)

    def bias_of(self, heads, length):
        shape = (self.batch, heads, length, length)
        if self.bias == "one row":
            return noise(1, length, seed=self.seed + 2, dtype=self.dtype)
        if self.bias == "added":
            return noise(*shape, seed=self.seed + 2, dtype=self.dtype)
        seen = noise(*shape, seed=self.seed + 3) > 0.5  # whole rows are masked now and then
        if self.bias == "boolean":
            return seen
        if self.bias == "infinite":
            return torch.zeros(shape, dtype=self.dtype).masked_fill(~seen, -torch.inf)
        return None

    def weights(self, call):
        """Return the explicit matrix, in NumPy and float64."""
        query, key = call.query.double().numpy(), call.key.double().numpy()
        scores = np.einsum("bhqd,bhkd->bhqk", query, key.repeat(self.shared, 1)) * call.scale
        bias = call.bias
        if self.bias == "boolean":
            scores = np.where(bias.numpy(), scores, -np.inf)
        elif bias is not None:
            scores = scores + bias.double().numpy()
        if self.bias == "causal":
            scores = np.where(np.tri(*scores.shape[-2:]) > 0, scores, -np.inf)
        return softmax(scores)


cases = st.builds(
    Case,
    batch=st.integers(0, 3),
    heads=st.integers(1, 3),
    shared=st.sampled_from([1, 1, 2]),
    prefix=st.integers(0, 3),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    suffix=st.integers(0, 2),
    per_cell=st.sampled_from([1, 1, 2, 3]),
    planes=st.booleans(),
    bias=st.sampled_from(["none", "causal", "one row", "added", "boolean", "infinite"]),
    size=st.sampled_from([0.1, 1.0]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=seeds,
)
tile_bytes = st.sampled_from([1, 100, 1000, measuring.TILE_BYTES])


def measured(call, case, limit, **how):
    before, measuring.TILE_BYTES = measuring.TILE_BYTES, limit
    try:
        return measure(call, ALL, case.layout, **how)
    finally:
        measuring.TILE_BYTES = before


class Largest(TorchDispatchMode):
    """Watches the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.untyped_storage().nbytes())
        return out


@given(case=cases, limit=tile_bytes)
def test_they_are_those_of_the_explicit_matrix(case, limit):
    call = case.build()
    expected = statistics(case.weights(call), case.places)
    ours = measured(call, case, limit)
    assert {one.dtype for one in ours.values()} == {case.dtype}
    assert_statistics(ours, expected)


@given(case=cases, limit=tile_bytes)
def test_for_the_mean_of_heads_they_are_those_of_the_mean_matrix(case, limit):
    call = case.build()
    expected = statistics(case.weights(call).mean(1), case.places)
    ours = measured(call, case, limit, heads="mean")
    assert_statistics(ours, expected)


@given(case=cases, limit=tile_bytes)
def test_of_explicit_code_they_are_those_of_its_matrix(case, limit):
    """Whose rows need not sum to one, and which is left as it is."""
    matrix = torch.from_numpy(case.weights(case.build())).to(case.dtype) * 0.5
    kept = matrix.clone()
    ours = measured(ExplicitCall(matrix, matrix), case, limit)
    assert_statistics(ours, statistics(matrix, case.places))
    assert_same_bits(matrix, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_float32(dtype):
    case = Case(2, 3, 1, 2, (4, 5), 1, 1, False, "none", 1.0, torch.float32, 3)
    call = case.build()
    half = FusedCall("", call.query.to(dtype), call.key.to(dtype), call.key.to(dtype), call.scale)
    ours = measured(half, case, 1000)
    assert {one.dtype for one in ours.values()} == {torch.float32}
    assert_statistics(ours, statistics(case.weights(half), case.places), size=10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [3e3, 1e4, 1e6])
def test_huge_scores_are_no_worse_than_those_of_the_matrix(dtype, size):
    case = Case(2, 2, 1, 2, (4, 5), 0, 1, False, "none", size, dtype, 3)
    call = case.build()
    ours = measured(call, case, 500)
    matrix = call.weights()
    assert matrix.isfinite().all()
    assert_statistics(ours, statistics(matrix, case.places), size=10)
    assert all(
        one.isfinite().all() for name, one in ours.items() if name in ("entropy", "received")
    )


def test_one_token_has_no_entropy_and_no_distance():
    case = Case(2, 2, 1, 0, (1, 1), 0, 1, False, "none", 1.0, torch.float64, 3)
    ours = measured(case.build(), case, 500)
    zero = torch.zeros(2, 2, 1, dtype=torch.float64)
    for name in ("entropy", "distance", "prefix_mass", "spread"):
        assert_same_bits(ours[name].abs(), zero)
    assert_same_bits(ours["received"], zero + 1)


def test_rows_that_are_masked_completely_have_zeros_and_no_place():
    case = Case(1, 1, 1, 1, (2, 2), 0, 1, False, "boolean", 1.0, torch.float64, 3)
    call = case.build()
    nothing = FusedCall("", call.query, call.key, call.key, 1.0, bias=call.bias & False)
    ours = measured(nothing, case, 500)
    for name in ("entropy", "received", "prefix_mass"):
        assert not ours[name].any()
    assert all(ours[name].isnan().all() for name in ("distance", "spread", "centroid"))


def test_rows_with_a_negative_weight_have_no_entropy():
    """Code may mix heads behind the softmax."""
    weights = noise(2, 3, 4, 5, seed=0, dtype=torch.float64).softmax(-1)
    plain = measure(ExplicitCall(weights, weights), ("entropy",), None)["entropy"]
    weights[1, 2, 3, 0] = -0.1
    found = measure(ExplicitCall(weights, weights), ("entropy",), None)["entropy"]
    assert found[1, 2, 3].isnan()
    assert int(found.isnan().sum()) == 1
    found[1, 2, 3] = plain[1, 2, 3]
    assert_same_bits(found, plain)


def test_uniform_attention_has_known_numbers():
    """Of a row of three patches, by hand."""
    query = torch.zeros(1, 1, 3, 2, dtype=torch.float64)
    ours = measure(FusedCall("", query, query, query, 1.0), ALL, Layout(0, 0, (1, 3)))
    assert_close(ours["entropy"], np.full((1, 1, 3), np.log(3)))
    assert_close(ours["distance"], np.array([[[1, 2 / 3, 1]]]))
    assert_close(ours["spread"], np.full((1, 1, 3), np.sqrt(2 / 3)))
    assert_close(ours["centroid"], np.array([[[[0, 1]] * 3]]))


def test_the_memory_is_that_of_a_few_rows():
    case = Case(2, 3, 1, 5, (30, 30), 0, 1, False, "none", 1.0, torch.float32, 3)
    call = case.build()
    with Largest() as largest:
        measured(call, case, 2**14)
    matrix = 4 * call.columns**2
    assert largest.size <= 2**16 < matrix / 40


def test_autocast_changes_nothing():
    case = Case(1, 2, 1, 1, (3, 3), 0, 1, False, "none", 1.0, torch.float32, 3)
    plain = measured(case.build(), case, 500)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(measured(case.build(), case, 500), plain)


@pytest.mark.parametrize(
    "names",
    ["entropies", ("entropy", "entropy"), 3, None, ("entropy", 1), [["entropy"]], b"entropy"],
)
def test_other_names_are_an_error(names):
    with pytest.raises(InvalidInputError, match="'entropy', 'distance'"):
        check_statistics(names)


def test_names_are_one_or_several():
    assert check_statistics("entropy") == ("entropy",)
    assert check_statistics(["spread", "entropy"]) == ("spread", "entropy")


def test_without_a_grid_two_of_them_are_left():
    case = Case(1, 2, 1, 1, (3, 3), 0, 1, False, "none", 1.0, torch.float32, 3)
    call = case.build()
    found = measure(call, ("entropy", "received"), None)
    expected = statistics(case.weights(call), case.places)
    assert_statistics(found, expected)
    for name in ("distance", "prefix_mass", "spread", "centroid"):
        with pytest.raises(
            InvalidInputError, match=f"patch grid among the 10 tokens, for '{name}'"
        ):
            measure(call, ("entropy", name), None)


def test_other_queries_than_keys_have_no_distance():
    query, key = noise(1, 2, 3, 4, seed=0), noise(1, 2, 9, 4, seed=1)
    call, layout = FusedCall("", query, key, key, 1.0), Layout(0, 0, (3, 3))
    assert measure(call, ("spread",), layout)["spread"].shape == (1, 2, 3)
    with pytest.raises(InvalidInputError, match="3 queries and 9 keys"):
        measure(call, ("distance",), layout)
