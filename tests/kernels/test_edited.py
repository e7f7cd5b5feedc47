"""Edited patterns at every kind of kernel: against one matrix that is edited by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from dinov2_attn.errors import InvalidInputError
from dinov2_attn.kernels.capture import Capture
from tests.kernels.test_capture import HEADS, KINDS, MASK, Attention, B, D, N, X, scores
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, assert_same_bits, same_bits

ROWS = st.none() | st.lists(st.integers(0, N - 1), unique=True, min_size=1).map(tuple)
# Key 0 stays, so that causal rows keep one.
KEYS = st.lists(st.integers(1, N - 1), unique=True, min_size=1, max_size=3)
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("zero"), st.lists(st.integers(0, HEADS - 1), unique=True, min_size=1)),
        st.tuples(st.just("hide"), ROWS, KEYS, st.booleans()),
        st.tuples(st.just("put"), ROWS),
    ),
    min_size=1,
    max_size=4,
)


def module_of(kernel, dtype=X.dtype):
    """Return the same module each time."""
    module = Attention(kernel, dtype)
    with torch.no_grad():
        module.qkv.bias.copy_(noise(*module.qkv.bias.shape, seed=2))
    return module


def mask_of(keys, each):
    """Return a mask for all samples, or one in which the last sample keeps its keys."""
    mask = torch.zeros(B if each else 1, N, dtype=torch.bool)
    mask[:, keys] = True
    if each:
        mask[-1] = False
    return mask


def turned(weights):
    return weights.roll(1, dims=1) * 0.5


def apply(part, kind, *details):
    if kind == "zero":
        return part.zero(*details)
    if kind == "hide":
        rows, keys, each = details
        return part.hide(rows, mask_of(keys, each))
    (rows,) = details
    return part.with_weights(rows, turned(part.weights_of(rows)))


def by_hand(weights, kind, *details):
    """Edit the matrix ``(B, HEADS, N, N)``, entry by entry."""
    weights = weights.clone()
    if kind == "zero":
        for head in details[0]:
            weights[:, head] = 0
        return weights
    rows = range(N) if details[0] is None else details[0]
    if kind == "put":
        old = weights.clone()
        for head in range(HEADS):
            for row in rows:
                weights[:, head, row] = old[:, head - 1, row] * 0.5
        return weights
    _, keys, each = details
    for sample in range(B - 1 if each else B):
        for head in range(HEADS):
            for row in rows:
                line = weights[sample, head, row]
                total = line.sum().item()
                line[keys] = 0
                if total:
                    line *= total / line.sum()
    return weights


def edited(kernel, edits, x=X, **options):
    """Return the output, the calls that receivers got, and the unedited call."""
    module, before, after = module_of(kernel, x.dtype), [], []
    with Capture(module, before.append):
        module(x)

    def change(pattern, _):
        for one in edits:
            pattern = pattern.each(lambda part, one=one: apply(part, *one))
        return pattern

    with Capture(module, after.append, edit=change, **options) as capture:
        output = module(x)
    assert capture.calls == 1
    return output, after[0], before[0]


@pytest.mark.parametrize("kind", KINDS)
@given(edits=EDITS)
def test_edits_in_any_order_are_those_of_the_matrix(kind, edits):
    output, call, unedited = edited(KINDS[kind], edits)
    expected = unedited.weights().detach()
    for one in edits:
        expected = by_hand(expected, *one)
    mixed = (expected @ unedited.value).transpose(1, 2).reshape(output.shape)
    assert_close(output, mixed, size=1.0)
    assert_close(call.weights(), expected, size=1.0)
    assert_close(call.weights([2, 0]), expected[:, :, [2, 0]], size=1.0)
    assert_close(call.weights([-1], "mean"), expected[:, :, -1:].mean(1), size=1.0)
    call.check("a module")


@pytest.mark.parametrize("kind", KINDS)
@given(edits=EDITS, data=st.data())
def test_rows_in_tiles_are_those_of_the_matrix(kind, edits, data):
    _, call, _ = edited(KINDS[kind], edits)
    whole = call.weights().detach()
    rows = data.draw(st.lists(st.integers(0, N - 1), unique=True, min_size=1))
    some = call.kept().at(rows).wide()
    memory = torch.empty(HEADS * N * N, dtype=torch.float64)
    heads, lines = slice(1, 3), slice(0, len(rows))
    found = some.tile(1, heads, lines, torch.tensor(rows), memory)
    assert_close(found, whole[1, heads][:, rows], size=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changed_is_the_same_bits(kind):
    module = module_of(KINDS[kind])
    plain = module(X)
    with Capture(module, lambda _: None, edit=lambda pattern, _: pattern):
        assert_same_bits(module(X), plain)
    output, _, _ = edited(KINDS[kind], [])
    assert_same_bits(output, plain)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("sdpa")])
def test_rows_and_heads_that_are_not_edited_are_those_of_the_kernel(kind):
    plain = module_of(KINDS[kind])(X).unflatten(-1, (HEADS, D))
    for edits in (
        [("hide", (2, 4), [1, 3], False)],
        [("put", (2, 4))],
        [("hide", (4,), [1], True), ("put", (2,))],
    ):
        output, _, _ = edited(KINDS[kind], edits)
        output = output.unflatten(-1, (HEADS, D))
        others = [0, 1, 3, 5]
        assert_same_bits(output[:, others], plain[:, others])
        assert not same_bits(output[:, [2, 4]], plain[:, [2, 4]])
    output, _, _ = edited(KINDS[kind], [("zero", [1])])
    output = output.unflatten(-1, (HEADS, D))
    assert_same_bits(output[:, :, [0, 2, 3]], plain[:, :, [0, 2, 3]])
    assert_same_bits(output[:, :, 1], torch.zeros_like(plain[:, :, 1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", [("zero", [1]), ("hide", (0, 3), [2], True), ("put", (1,))])
def test_gradients_are_those_of_the_matrix(kind, edit):
    if kind == "in a buffer":
        pytest.skip("torch.softmax(out=) has no gradient; the other kinds run")
    module = module_of(KINDS[kind])

    def change(pattern, _):
        return pattern.each(lambda part: apply(part, *edit))

    with Capture(module, lambda _: None, edit=change):
        output = module(X)
    cotangent = noise(*output.shape, seed=9, dtype=torch.float64)
    (ours,) = torch.autograd.grad(output, module.qkv.weight, cotangent)
    calls = []
    with Capture(module, calls.append):
        module(X)
    weights = calls[0].weights()
    expected = differentiable(weights, *edit) @ calls[0].value
    expected = expected.transpose(1, 2).reshape(output.shape)
    (theirs,) = torch.autograd.grad(expected, module.qkv.weight, cotangent)
    assert_close(ours, theirs)


def differentiable(weights, kind, *details):
    """Edit a matrix by products with masks."""
    if kind == "zero":
        keep = torch.ones(HEADS, 1, 1, dtype=weights.dtype)
        keep[details[0]] = 0
        return weights * keep
    rows = torch.zeros(N, 1, dtype=weights.dtype)
    rows[list(details[0])] = 1
    if kind == "put":
        return weights * (1 - rows) + rows * turned(weights)
    seen = (~mask_of(details[1], details[2])).to(weights.dtype)[:, None, None]
    left = weights * seen
    left = left / left.sum(-1, keepdim=True) * weights.sum(-1, keepdim=True)
    left = torch.where(weights.sum(-1, keepdim=True) == 0, torch.zeros_like(left), left)
    return weights * (1 - rows) + rows * left


def test_fewer_heads_of_keys_serve_several_of_the_query():
    def grouped(q, k, v):
        return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)

    edits = [("hide", (1, 2), [3], False), ("put", (2, 4)), ("zero", [3])]
    try:
        output, call, unedited = edited(grouped, edits)
    except TypeError:
        pytest.skip("this torch has no enable_gqa; the other kinds run")
    expected = unedited.weights()
    for one in edits:
        expected = by_hand(expected.detach(), *one)
    mixed = expected @ unedited.value.repeat_interleave(2, 1)
    assert_close(output, mixed.transpose(1, 2).reshape(output.shape), size=1.0)
    assert_close(call.weights(), expected, size=1.0)


@pytest.mark.parametrize(
    ("kind", "rows", "keys", "words"),
    [
        ("sdpa", None, range(N), "any query"),
        ("sdpa", (2,), range(N), "query 2"),
        ("sdpa causal", None, [0], "query 0"),
        ("sdpa causal", (3,), [0, 1, 2, 3], "query 3"),
        ("sdpa boolean mask", (1, 2), [0, 1], "query 1"),
        ("softmax @", (1,), range(N), "query 1"),
    ],
)
def test_a_row_without_any_key_is_an_error(kind, rows, keys, words):
    with pytest.raises(InvalidInputError, match=words):
        edited(KINDS[kind], [("hide", rows, list(keys), False)])


def test_a_second_edit_that_takes_the_last_key_is_an_error():
    first, second = ("hide", None, [0, 1, 2], False), ("hide", (4,), [3, 4, 5], False)
    with pytest.raises(InvalidInputError, match="query 4"):
        edited(KINDS["sdpa"], [first, second])
    with pytest.raises(InvalidInputError, match="have none"):
        edited(KINDS["sdpa"], [("put", (4,)), ("hide", None, [0, 1, 2], False), second])


def test_rows_that_the_module_masks_itself_stay_as_they_were():
    mask = MASK.clone()
    mask[3] = False

    def masked(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask)

    plain = module_of(masked)(X)
    if not plain.isfinite().all():
        pytest.skip("this torch gives NaN for such rows; the other kinds run")
    output, call, _ = edited(masked, [("hide", None, [1], False)])
    assert not call.weights()[:, :, 3].any()
    assert output.isfinite().all()


def test_dropout_of_explicit_code_drops_the_edited_weights():
    def dropped(q, k, v):
        return F.dropout(scores(q, k).softmax(-1), 0.5, True) @ v

    torch.manual_seed(0)
    plain = module_of(dropped)(X).unflatten(-1, (HEADS, D))
    torch.manual_seed(0)
    output, _, _ = only_edited(dropped, [("zero", [1])])
    output = output.unflatten(-1, (HEADS, D))
    assert_same_bits(output[:, :, [0, 2, 3]], plain[:, :, [0, 2, 3]])
    _, call, factors = only_edited(dropped, [("put", None)])
    assert_close(call.weights().sum(-1), torch.full((B, HEADS, N), 0.5, dtype=torch.float64))
    kept = factors[0] != 0
    assert 0.3 < float(kept.double().mean()) < 0.7
    assert_close(factors[0][kept], 2 * call.weights()[kept])


def only_edited(kernel, edits):
    """Run once, and return what is multiplied too."""
    module, calls, factors = module_of(kernel), [], []

    def change(pattern, _):
        for one in edits:
            pattern = pattern.each(lambda part, one=one: apply(part, *one))
        factors.append(getattr(pattern, "factor", None))
        return pattern

    with Capture(module, calls.append, edit=change):
        output = module(X)
    return output, calls[0], factors


def test_dropout_of_a_fused_kernel_drops_the_edited_weights():
    def dropped(q, k, v):
        return F.scaled_dot_product_attention(q, k, torch.ones_like(v), dropout_p=0.5)

    for edits in ([("hide", (2,), [1], False)], [("put", (2,))]):
        rows = torch.stack([only_edited(dropped, edits)[0][:, 2].detach() for _ in range(200)])
        mean = 0.5 if edits[0][0] == "put" else 1.0
        assert_close(rows.mean(), torch.tensor(mean), within=0.1)
        assert float(rows.std()) > 0.05


def test_a_pass_that_stops_is_given_edited_weights_and_runs_no_kernel():
    ran = []

    def kernel(q, k, v):
        ran.append("before")
        out = F.scaled_dot_product_attention(q, k, v)
        ran.append("after")
        return out

    edits, calls = [("hide", (1,), [2], False)], []

    def change(pattern, _):
        return pattern.each(lambda part: apply(part, *edits[0]))

    module = module_of(kernel)
    with (
        pytest.raises(BaseException, match="^$"),
        Capture(module, calls.append, stops=True, edit=change),
    ):
        module(X)
    assert ran == ["before"]
    _, call, _ = edited(KINDS["sdpa"], edits)
    assert_close(calls[0].weights(), call.weights())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sdpa", "sdpa bias", "sdpa causal", "softmax @"])
def test_lower_precision_and_autocast(kind, dtype):
    module = module_of(KINDS[kind], torch.float32)
    edits = [("hide", (1, 4), [2], False), ("put", (2,)), ("zero", [0])]
    calls = []

    def change(pattern, _):
        for one in edits:
            pattern = pattern.each(lambda part, one=one: apply(part, *one))
        return pattern

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        try:
            plain = module(X.float())
        except RuntimeError:
            pytest.skip("this torch's autocast does not cast for its kernel; float32 runs")
        with Capture(module, calls.append, edit=change):
            output = module(X.float())
    assert (output.dtype, output.shape) == (plain.dtype, plain.shape)
    double, _, _ = edited(KINDS[kind], edits)
    assert_close(output.double(), double, dtype=dtype, size=4.0)
    assert math.isfinite(float(output.detach().float().sum()))


@pytest.mark.parametrize(
    "kernel",
    [F.scaled_dot_product_attention, lambda q, k, v: (q @ k.mT / math.sqrt(D)).softmax(-1) @ v],
)
def test_two_matrices_without_batch_and_heads_are_edited(kernel):
    query, key, value = noise(3, N, D, seed=0, dtype=torch.float64)

    def change(pattern, _):
        return pattern.hide((1,), torch.arange(N)[None] == 2)

    calls = []
    with Capture(torch.nn.Identity(), calls.append, edit=change):
        output = kernel(query, key, value)
    assert output.shape == value.shape
    assert_close(output, calls[0].weights()[0, 0] @ value)
    assert not calls[0].weights()[0, 0, 1, 2]
