"""What an edited call answers and runs: against a matrix that is edited by hand."""

from __future__ import annotations

import pytest
import torch

from dinov2_attn.errors import InvalidInputError, NotEditedError
from dinov2_attn.kernels.call import ExplicitCall, FusedCall, fused_call
from dinov2_attn.kernels.edited import EditedCall, Hidden, editable
from tests.kernels.test_calls import BIASES, B, D, H, N, Q, V, assert_answers, given, softmax_of
from tests.math.test_bias import OwnBlocks
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, assert_same_bits

HIDDEN = torch.zeros(B, N, dtype=torch.bool)
HIDDEN[0, 1] = HIDDEN[0, 4] = HIDDEN[1, 2] = True

# Each edit as a call takes it, and by hand. ``scores`` are those of the kernel, with its bias.
EDITS = {
    "keys of all rows": lambda call: call.hide(None, HIDDEN),
    "keys of all rows and samples": lambda call: call.hide(None, HIDDEN[:1]),
    "keys of some rows": lambda call: call.hide((0, 3), HIDDEN),
    "a head": lambda call: call.zero([1]),
    "two heads, one by one": lambda call: call.zero([1]).zero([0]),
    "some weights": lambda call: call.with_weights((3, 1), call.weights_of((3, 1)) / 2),
    "all weights": lambda call: call.with_weights(None, call.weights_of(None) / 2),
    "keys twice": lambda call: call.hide(None, HIDDEN[:1]).hide((2, 3), HIDDEN[1:]),
    "weights, then keys of others": lambda call: EDITS["some weights"](call).hide((0,), HIDDEN),
    "weights, then keys": lambda call: EDITS["some weights"](call).hide((1, 2), HIDDEN),
    "weights, then a head": lambda call: EDITS["some weights"](call).zero([2]),
    "keys, then weights": lambda call: EDITS["some weights"](call.hide(None, HIDDEN)),
    "a head, then weights": lambda call: EDITS["some weights"](call.zero([1])),
    "weights twice": lambda call: EDITS["some weights"](call).with_weights(
        (1, 4), call.weights_of((1, 4)) * 3
    ),
    "everything": lambda call: EDITS["keys, then weights"](call.zero([0])).hide((0, 1), HIDDEN),
}


class ByHand:
    """The matrix itself, under the same edits."""

    def __init__(self, weights):
        self.weights = weights

    def hide(self, rows, keys):
        weights = self.weights.clone()
        for sample in range(B):
            for row in range(Q) if rows is None else rows:
                line = weights[sample, :, row]
                sums = line.sum(-1, keepdim=True)
                line[:, keys[min(sample, len(keys) - 1)]] = 0
                left = line.sum(-1, keepdim=True)
                weights[sample, :, row] = torch.where(sums == 0, line, line * sums / left)
        return ByHand(weights)

    def zero(self, heads):
        weights = self.weights.clone()
        weights[:, heads] = 0
        return ByHand(weights)

    def weights_of(self, rows):
        return self.weights[:, :, list(range(Q) if rows is None else rows)]

    def with_weights(self, rows, part):
        weights = self.weights.clone()
        weights[:, :, list(range(Q) if rows is None else rows)] = part
        return ByHand(weights)


def built(bias, causal=False, dtype=torch.float64):
    query, key, value = given([(B, H)] * 3, dtype)
    mask = None if bias == "nothing" else BIASES[bias](Q)
    call = fused_call(query, key, value, mask, is_causal=causal)
    weights = softmax_of(query.double(), key.double(), mask, causal)
    return call, weights, lambda: (weights @ value.double()).to(dtype)


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", EDITS)
def test_an_edited_call_answers_and_runs_as_the_matrix(name, bias, causal, tiles):
    call, weights, _ = built(bias, causal)
    expected = EDITS[name](ByHand(weights)).weights
    with torch.set_grad_enabled(not tiles):
        for start in (editable(call), editable(call).explicit()):
            found = EDITS[name](start)
            assert_answers(found, expected, call.value)
            output = found.run(lambda: weights @ call.value)
            assert_close(output, expected @ call.value)
            assert_close(found.explicit().run(None), output)
            found.ran(output, lambda out: out).check("a module")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("grad", [False, True])
def test_its_own_weights_make_the_output_without_the_kernel(bias, causal, grad):
    call, weights, _ = built(bias, causal)
    with torch.set_grad_enabled(grad):
        own = editable(call).explicit()
        assert_close(own.run(None), weights @ call.value)
        assert own.weights() is own.weights()  # so that a gradient by it can be asked
        assert_answers(own, weights, call.value)
    assert own.is_changed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", EDITS)
def test_an_edited_call_answers_in_its_dtype(name, dtype):
    call, weights, original = built("numbers", dtype=dtype)
    found = EDITS[name](editable(call))
    assert found.weights().dtype == found.weights([1], "mean").dtype == dtype
    expected = EDITS[name](ByHand(weights)).weights
    assert_close(found.weights().double(), expected, dtype=dtype)
    assert found.run(original).dtype == dtype
    some = found.kept().at([0, 2]).wide()
    memory = torch.empty(2 * N)
    tile = some.tile(0, slice(0, 1), slice(0, 2), torch.tensor([0, 2]), memory)
    assert tile.dtype == torch.float32


def test_the_kernel_runs_once_and_only_where_its_rows_are_used():
    call, _, original = built("nothing")
    ran = []

    def counted():
        ran.append(True)
        return original()

    for name, times in (
        ("keys of all rows", 0),
        ("keys of some rows", 1),
        ("a head", 1),
        ("some weights", 1),
        ("all weights", 0),
        ("weights, then keys of others", 1),
    ):
        ran.clear()
        EDITS[name](editable(call)).run(counted)
        assert len(ran) == times, name


def test_hidden_keys_of_all_rows_take_one_row_of_a_mask():
    call, _, _ = built("nothing")
    assert editable(call).hide(None, HIDDEN).masked.bias.shape == (B, 1, 1, N)
    assert editable(call).hide((1,), HIDDEN[:1]).masked.bias.shape == (1, 1, Q, N)


@torch.no_grad()
def test_weights_of_hidden_keys_lie_in_the_memory_that_is_asked():
    call, _, _ = built("nothing")
    memory = torch.empty(B, H, 1, N, dtype=torch.float64)
    found = editable(call).hide(None, HIDDEN).weights([2], new=lambda like, shape: memory)
    assert found is memory


@pytest.mark.parametrize("probability", [0.25, 0.75])
def test_edited_weights_are_dropped_with_the_probability_of_the_kernel(probability):
    query, key, _ = given([(B, H)] * 3)
    value = torch.eye(N, dtype=torch.float64).expand(B, H, N, N)
    call = FusedCall("a kernel", query, key, value, 0.3, dropout=probability)
    weights = call.weights()
    explicit = editable(ExplicitCall(weights, value, dropout=probability))
    torch.manual_seed(0)
    for found, expected in (
        (editable(call).with_weights(None, weights / 2), weights / 2),
        (editable(call).hide(None, HIDDEN), editable(call).hide(None, HIDDEN).weights()),
        (explicit.with_weights(None, weights / 2), weights / 2),
    ):
        output = found.run(None)
        kept = output != 0
        assert_close(output[kept], expected[kept] / (1 - probability))
        share = float(kept[expected != 0].double().mean())
        assert abs(share - (1 - probability)) < 0.12


def test_keys_may_be_named_on_another_device():
    """A mask of the CPU hides keys on a GPU. The device without numbers is another one as well."""
    query, key, value = (tensor.to("meta") for tensor in given([(B, H)] * 3))
    call = fused_call(query, key, value)
    for rows in (None, (1,)):
        edited = EditedCall(call, (Hidden(rows, HIDDEN),))
        assert edited.masked.bias.device.type == "meta"


@pytest.mark.parametrize("rows", [1, 2])
def test_a_mask_of_a_few_queries(rows):
    query, key, value = (tensor[:, :, :rows] for tensor in given([(B, H)] * 3))
    bias = noise(rows, rows, seed=1, dtype=torch.float64)
    call = fused_call(query, key, value, bias)
    hidden = torch.tensor([[rows > 1, False]])[:, :rows]
    found = editable(call).hide((rows - 1,), hidden)
    expected = softmax_of(query, key, bias)
    if rows > 1:
        expected[:, :, 1] = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert_close(found.weights(), expected)
    assert_close(found.run(lambda: call.weights() @ value), expected @ value)


def explicit(call):
    return ExplicitCall(call.weights(), call.value)


@pytest.mark.parametrize("kind", [lambda call: call, explicit])
@pytest.mark.parametrize(
    ("samples", "rows", "words"),
    [
        ((2,), None, "any query"),
        ((0, 1, 2), None, "any query"),
        ((2,), (3, 1), "query [31]"),
        ((0,), (4,), "query 4"),
    ],
)
def test_a_row_that_loses_its_last_key_in_any_sample_is_named(kind, samples, rows, words):
    query, key, value = given([(3, H)] * 3)
    hidden = torch.zeros(3, N, dtype=torch.bool)
    hidden[:, 1] = hidden[list(samples)] = True
    pattern = editable(kind(fused_call(query, key, value)))
    with pytest.raises(InvalidInputError, match=f"left for {words}"):
        pattern.hide(rows, hidden)
    hidden[:, 0] = False
    pattern.hide(rows, hidden)


def test_a_row_is_named_by_its_position_under_a_causal_mask():
    call, _, _ = built("nothing", causal=True)
    first = torch.arange(N)[None] < 3
    for rows, words in ((None, "query 0"), ((3, 2, 4), "query 2"), ((4, 1), "query 1")):
        with pytest.raises(InvalidInputError, match=f"left for {words}"):
            editable(call).hide(rows, first)


@pytest.mark.parametrize("rows", [None, (1, 3), (4, 3, 0)])
def test_the_row_that_loses_its_keys_is_named_and_no_other(rows):
    query, key, value = given([(B, H)] * 3)
    mask = torch.ones(Q, N, dtype=torch.bool)
    mask[3, 2:] = False
    call = fused_call(query, key, value, mask)
    with pytest.raises(InvalidInputError, match="left for query 3"):
        editable(call).hide(rows, torch.arange(N)[None] < 2)


def test_an_explicit_call_that_is_edited_has_the_gradient_of_what_is_multiplied():
    _, weights, _ = built("nothing")
    value = given([(B, H)] * 3)[2]
    leaf = weights.requires_grad_()
    pattern = editable(ExplicitCall(leaf, value))
    assert pattern.call().place is None
    for edit in (lambda p: p.zero([1]), lambda p: p.hide((1,), HIDDEN), EDITS["all weights"]):
        changed, seen = edit(pattern), []
        call = changed.call()
        call.place.watch(seen.append)
        cotangent = noise(B, H, Q, V, seed=7, dtype=torch.float64)
        (changed.run(None) @ value * cotangent).sum().backward()
        assert_close(seen[0], cotangent @ value.mT)
        assert_close(call.weights(), changed.run(None))
    dropped = editable(ExplicitCall(leaf, value, dropout=0.5), leaf * 2).zero([1])
    assert dropped.call().place is None  # behind dropout it would be another gradient
    assert_same_bits(dropped.run(None)[:, 0], leaf[:, 0] * 2)


def test_a_fused_call_that_is_edited_has_the_gradient_by_its_output():
    call, _, original = built("nothing")
    call.query.requires_grad_()
    found, seen = editable(call).hide(None, HIDDEN), []
    output = found.run(original).transpose(1, 2)
    ran = found.ran(output, lambda out: out.transpose(1, 2))
    assert_same_bits(ran.output, output.transpose(1, 2))
    ran.place.watch(seen.append)
    cotangent = noise(*output.shape, seed=7, dtype=torch.float64)
    (output * cotangent).sum().backward()
    assert_same_bits(seen[0], cotangent.transpose(1, 2))


LENGTHS = [2, 4, 3]


@pytest.mark.parametrize(
    "edit",
    [
        lambda part: part,
        lambda part: part.zero([1]),
        lambda part: part.hide(None, torch.arange(part.columns)[None] == 1),
        lambda part: part.with_weights((1,), part.weights_of((1,)).roll(1, 1)),
        lambda part: part.hide((0,), torch.arange(part.columns)[None] == part.columns - 1),
    ],
)
def test_each_element_of_a_list_is_edited_by_itself(edit):
    query, key, value = (
        noise(1, H, sum(LENGTHS), size, seed=i, dtype=torch.float64)
        for i, size in enumerate((D, D, V))
    )
    call = FusedCall("a kernel", query, key, value, 0.3, OwnBlocks(LENGTHS))
    expected, outputs = [], []
    for one, k, v in zip(*(t.split(LENGTHS, 2) for t in (query, key, value)), strict=True):
        alone = edit(editable(FusedCall("a kernel", one, k, v, 0.3)))
        expected.append(alone.weights())
        outputs.append(alone.run(lambda c=alone: c.base.weights() @ c.value))
        assert_close(outputs[-1], expected[-1] @ v)
    found = editable(call).each(edit)
    whole = torch.cat([part.weights() @ part.value for part in editable(call).parts], 2)
    assert_close(found.run(lambda: whole), torch.cat(outputs, 2))
    memory = []

    def new(like, shape):
        memory.append(torch.empty(shape, dtype=like.dtype))
        return memory[-1]

    with torch.no_grad():
        for one, other in zip(found.weights(), expected, strict=True):
            assert_close(one, other)
        for one, other in zip(found.weights([1], "mean"), expected, strict=True):
            assert_close(one, other[:, :, [1]].mean(1))
        for one in found.weights(new=new):
            assert not memory or any(one is other for other in memory)
        assert len(memory) == (
            0 if any(part.put_rows or part.zeroed for part in found.parts) else 3
        )
    ran = found.ran(whole, lambda out: out + 1)
    ran.check("a module")
    assert ran.proofs("a module") == []
    assert_same_bits(ran.output, whole + 1)
    by_output = noise(1, H, sum(LENGTHS), V, seed=9, dtype=torch.float64)
    gradients = ran.gradients(by_output, [0])
    for one, g, v in zip(
        gradients, by_output.split(LENGTHS, 2), value.split(LENGTHS, 2), strict=True
    ):
        assert_close(one, g[:, :, :1] @ v.mT)


def test_a_kernel_that_takes_no_mask_is_an_error_that_says_so():
    kernels = pytest.importorskip("torch.nn.attention", reason="this torch has no sdpa_kernel")
    call, _, original = built("nothing")
    found = editable(call).hide(None, HIDDEN)
    with (
        kernels.sdpa_kernel(kernels.SDPBackend.FLASH_ATTENTION),
        pytest.raises(NotEditedError, match="allows none"),
    ):
        found.run(original)


def test_rows_of_a_kernel_with_another_scale():
    query, key, value = given([(B, H)] * 3)
    call = FusedCall("a kernel", query, key, value, 0.7)
    found = editable(call).hide((1, 2), HIDDEN)
    expected = ByHand((query @ key.mT * 0.7).softmax(-1)).hide((1, 2), HIDDEN).weights
    assert_close(found.run(lambda: call.weights() @ value), expected @ value)
