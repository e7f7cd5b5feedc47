"""What a call answers, however its kernel was given it: weights, rows, tiles, gradients, copies."""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from dinov2_attn.errors import InvalidInputError, UnfaithfulError
from dinov2_attn.kernels.call import (
    ExplicitCall,
    FusedCall,
    Proof,
    as_given,
    by_heads,
    fused_call,
    some_rows,
    verify,
)
from dinov2_attn.kernels.edited import editable
from dinov2_attn.kernels.place import place_of
from tests.math.test_bias import OwnBlocks
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, assert_same_bits

B, H, W, Q, N, D, V = 2, 3, 4, 5, 7, 6, 8

# The leading sizes of query, key and value, and how many heads the module has.
LAYOUTS = {
    "batch and heads": ([(B, H), (B, H), (B, H)], H),
    "heads in the batch": ([(B * H,), (B * H,), (B * H,)], H),
    "no heads": ([(B,), (B,), (B,)], None),
    "heads that do not divide the batch": ([(B,), (B,), (B,)], H),
    "two matrices": ([(), (), ()], H),
    "windows before heads": ([(B, W, H)] * 3, H),
    "heads before windows": ([(B, H, W)] * 3, H),
    "two dimensions of windows": ([(B, W, H, W)] * 3, H),
    "as many windows as heads": ([(B, H, H)] * 3, H),
    "as many samples and windows as heads": ([(H, H, W)] * 3, H),
    "one query for all samples": ([(1, H), (B, H), (B, H)], H),
    "one query for all heads": ([(B, 1), (B, H), (B, H)], H),
    "one key for all samples": ([(B, H), (1, H), (B, H)], H),
    "one value for all samples": ([(B, H), (B, H), (1, H)], H),
    "one key for all heads": ([(B, H), (B, 1), (B, 1)], H),
    "one value for all heads": ([(B, H), (B, H), (B, 1)], H),
    "one query and one key for all heads": ([(B, 1), (B, 1), (B, H)], H),
    "two keys for four heads": ([(B, 4), (B, 2), (B, 2)], 4),
    "a sample of one head": ([(1, 1), (1, 1), (1, 1)], 1),
}
BIASES = {
    "nothing": None,
    "mask": lambda queries: (
        (torch.arange(queries * N).reshape(queries, N) % 3 != 1) | (torch.arange(N) == 0)
    ),
    "a number for each key": lambda queries: noise(1, N, seed=8, dtype=torch.float64),
    "a number for each key alone": lambda queries: noise(N, seed=8, dtype=torch.float64),
    "numbers": lambda queries: noise(queries, N, seed=9, dtype=torch.float64),
}


def given(leading, dtype=torch.float64):
    sizes = ((Q, D), (N, D), (N, V))
    return [
        noise(*lead, *size, seed=i, dtype=torch.float64).to(dtype)
        for i, (lead, size) in enumerate(zip(leading, sizes, strict=True))
    ]


def softmax_of(query, key, bias=None, causal=False):
    """Return the weights of the definition, with the leading sizes of what is given."""
    if key.ndim > 3 and query.shape[-3] > key.shape[-3] > 1:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if bias is not None:
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
    if causal:
        scores = scores.masked_fill(~torch.ones(Q, N, dtype=torch.bool).tril(), -math.inf)
    return scores.softmax(-1)


def heads_first(tensor, name, heads):
    """Return what the definition gives as ``(B, heads, …, …)``."""
    if tensor.ndim < 4:
        whole = heads is not None and tensor.ndim == 3 and tensor.shape[0] % heads == 0
        return tensor.reshape(-1, heads if whole else 1, *tensor.shape[-2:])
    behind = tensor.movedim(BEHIND[name], -3) if name in BEHIND else tensor
    return behind.reshape(-1, *behind.shape[-3:])


BEHIND = {"heads before windows": 1, "two dimensions of windows": 2}


def in_tiles(call, rows):
    """Return some rows of a call, in pieces of one sample, two heads and two rows."""
    some = call.kept().at(rows).wide()
    found = torch.full((call.batch, call.heads, len(rows), call.columns), math.nan)
    found = found.to(torch.promote_types(call.dtype, torch.float32))
    memory = torch.empty(call.heads * len(rows) * call.columns, dtype=found.dtype)
    for sample in range(call.batch):
        for head in range(0, call.heads, 2):
            for line in range(0, len(rows), 2):
                heads, lines = slice(head, head + 2), slice(line, line + 2)
                place = torch.tensor(rows)[lines]
                found[sample, heads, lines] = some.tile(sample, heads, lines, place, memory)
    return found


def assert_answers(call, weights, value):
    """Every way to ask ``call`` gives these ``weights (B, heads, Q, N)``."""
    batch, heads, rows, _ = weights.shape
    assert (call.batch, call.heads, call.rows, call.columns) == weights.shape
    assert (call.dtype, call.device) == (weights.dtype, weights.device)
    for one in (call, call.kept(), call.detached()):
        assert_close(one.weights(), weights)
        assert_close(one.weights([2, 0, -1]), weights[:, :, [2, 0, -1]])
        assert_close(one.weights(slice(1, 4), "mean"), weights[:, :, 1:4].mean(1))
    memory = []

    def new(like, shape):
        memory.append(torch.full(shape, math.nan, dtype=like.dtype))
        return memory[0]

    with torch.no_grad():
        assert_close(call.weights([3], "mean"), weights[:, :, 3:4].mean(1))
        found = call.weights(slice(0, 2), new=new)
    assert_close(found, weights[:, :, :2])
    if isinstance(call, FusedCall) or memory:
        assert found is memory[0]
    assert_close(in_tiles(call, [4, 0, 2]), weights[:, :, [4, 0, 2]])
    by_output = noise(batch, heads, rows, value.shape[-1], seed=5, dtype=torch.float64)
    value = value.repeat_interleave(heads // value.shape[1], 1)
    by_weights = by_output @ value.mT
    if isinstance(call, ExplicitCall):
        by_output = by_weights
    assert_close(call.gradients(by_output), by_weights)
    assert_close(call.gradients(by_output, [2, -1]), by_weights[:, :, [2, -1]])
    assert_close(call.gradients(by_output, [1], "mean"), by_weights[:, :, [1]].mean(1))
    for head in range(heads):
        for line in range(0, rows, 2):
            one, lines = slice(head, head + 1), slice(line, line + 2)
            found = call.gradient_tile(by_output, batch - 1, one, lines)
            assert_close(found, by_weights[batch - 1, one, lines])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_fused_call_answers_with_its_weights(name, bias, causal):
    leading, heads = LAYOUTS[name]
    query, key, value = given(leading)
    mask = None if bias == "nothing" else BIASES[bias](Q)
    call = fused_call(query, key, value, mask, is_causal=causal, heads=heads)
    expected = softmax_of(query, key, mask, causal)
    if key.ndim > 3 and key.shape[-3] < query.shape[-3]:
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    output = expected @ value
    if name == "one value for all samples":
        value = value.expand(B, -1, -1, -1)
    expected = heads_first(expected, name, heads)
    if name == "one query and one key for all heads":
        expected = expected.expand(-1, H, -1, -1)
    assert_answers(call, expected, call.value)
    ran = call.ran(output, partial(by_heads, heads=heads))
    assert_close(ran.output, expected @ call._by_query_head[1])
    ran.check("a module")
    for _ in range(3):
        ran.check("a module", one_head=True)
    (facets,) = call.facets(("query", "key", "value"))
    for one in ("query", "key", "value"):
        assert_same_bits(facets[one], getattr(call, one))
        assert facets[one].is_contiguous()
        assert facets[one].untyped_storage().data_ptr() != getattr(call, one).data_ptr()
    assert_same_bits(as_given(by_heads(output, heads), output.shape, heads), output)


@pytest.mark.parametrize(
    "name", ["heads in the batch", "windows before heads", "heads before windows"]
)
@pytest.mark.parametrize("size", [(1, N), (Q, N)])
def test_a_bias_of_each_head_or_window_stays_with_it(name, size):
    leading, heads = LAYOUTS[name]
    query, key, value = given(leading)
    bias = noise(*leading[0], *size, seed=3, dtype=torch.float64)
    call = fused_call(query, key, value, bias, heads=heads)
    assert_answers(call, heads_first(softmax_of(query, key, bias), name, heads), call.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_call_answers_in_its_dtype_and_computes_in_more(dtype):
    query, key, value = given([(B, H)] * 3, dtype)
    call = fused_call(query, key, value)
    wide = [tensor.double() for tensor in (query, key, value)]
    expected = softmax_of(*wide[:2])
    assert call.weights().dtype == call.weights([1], "mean").dtype == dtype
    assert_close(call.weights().double(), expected, dtype=dtype)
    tiles = in_tiles(call, [3, 1])
    assert tiles.dtype == torch.float32
    assert_close(tiles.double(), expected[:, :, [3, 1]], dtype=torch.float32)
    by_output = noise(B, H, Q, V, seed=5).double()
    tile = call.wide().gradient_tile(by_output, 1, slice(0, 2), slice(1, 3))
    assert tile.dtype == torch.float32
    assert_close(tile.double(), (by_output @ wide[2].mT)[1, :2, 1:3], dtype=torch.float32)
    kept = call.kept().wide()
    assert kept.value is kept.key
    assert kept.key.dtype == torch.float32
    memory = torch.empty(2 * N)
    with torch.no_grad():
        found = kept.tile(0, slice(0, 1), slice(0, 2), torch.arange(2), memory)
    assert found.data_ptr() == memory.data_ptr()


def test_a_single_key_has_all_weight():
    query, key, value = given([(B, H)] * 3)
    call = fused_call(query, key[:, :, :1], value[:, :, :1])
    assert_answers(call, torch.ones(B, H, Q, 1, dtype=torch.float64), value[:, :, :1])


@pytest.mark.parametrize("sizes", [(0, N), (Q, 0), (0, 0)])
def test_a_call_of_no_rows_or_no_keys_proves_nothing(sizes):
    query, key, value = given([(B, H)] * 3)
    call = fused_call(query[:, :, : sizes[0]], key[:, :, : sizes[1]], value[:, :, : sizes[1]])
    call = call.ran(torch.zeros(B, H, sizes[0], V).double(), lambda out: out)
    call.check("a module")
    assert call.weights().shape == (B, H, *sizes)


def test_copies_of_what_a_kernel_was_given_are_contiguous():
    query, key, value = (tensor.transpose(1, 2).contiguous() for tensor in given([(B, H)] * 3))
    by_head = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    for call in (
        fused_call(*by_head),
        ExplicitCall(softmax_of(*by_head[:2]), by_head[2], *by_head[:2]),
    ):
        (found,) = call.facets(("query", "key", "value"))
        for one, tensor in zip(found.values(), by_head, strict=True):
            assert_same_bits(one, tensor)
            assert one.is_contiguous()


class CausalBlocks(OwnBlocks):
    """Blocks with something to add inside."""

    def _create_block_mask(self, shape, dtype, device):
        return torch.full(shape, -math.inf, dtype=dtype, device=device).triu(1)


@pytest.mark.parametrize("causal", [False, True])
def test_a_list_answers_for_each_of_its_elements(causal):
    lengths = [3, 2, 4]
    query, key, value = (
        noise(1, H, sum(lengths), size, seed=i, dtype=torch.float64)
        for i, size in enumerate((D, D, V))
    )
    alone = [
        FusedCall("a kernel", *each, 0.3, is_causal=causal)
        for each in zip(*(t.split(lengths, 2) for t in (query, key, value)), strict=True)
    ]
    blocks = (CausalBlocks if causal else OwnBlocks)(lengths)
    call = FusedCall("a kernel", query, key, value, 0.3, blocks)
    output = torch.cat([one.weights() @ one.value for one in alone], 2)
    ran = call.ran(output, lambda out: out)
    ran.check("a module")
    ran.check("a module", one_head=True)
    assert len(ran.proofs("a module")) == len(ran.parts) == 3
    with pytest.raises(UnfaithfulError):
        call.ran(output + (torch.arange(9) > 4)[:, None], lambda out: out).check("a module")
    by_output = noise(1, H, sum(lengths), V, seed=5, dtype=torch.float64)
    memory = []

    def new(like, shape):
        memory.append(torch.empty(shape, dtype=like.dtype))
        return memory[-1]

    with torch.no_grad():
        answers = [
            (call.weights(), [one.weights() for one in alone]),
            (call.weights([1]), [one.weights([1]) for one in alone]),
            (call.weights([0], "mean"), [one.weights([0], "mean") for one in alone]),
            (call.weights(new=new), memory),
            (call.gradients(by_output), [g @ one.value.mT for g, one in of(by_output, alone)]),
            (
                call.gradients(by_output, [1], "mean"),
                [(g[:, :, 1:2] @ one.value.mT).mean(1) for g, one in of(by_output, alone)],
            ),
            (
                [found["value"] for found in call.facets(("value",))],
                [one.value for one in alone],
            ),
            ([part.key for part in call.parts], [one.key for one in alone]),
        ]
    for found, expected in answers:
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)


def of(by_output, calls):
    """Return each call with its rows of the gradient by the output."""
    return zip(by_output.split([call.rows for call in calls], 2), calls, strict=True)


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("given_as", [torch.float32, torch.bfloat16])
def test_under_autocast_a_call_is_in_the_dtype_of_its_kernel(ran, given_as):
    query, key, value = given([(B, H)] * 3, torch.float32)
    value = value.to(given_as)
    with torch.autocast("cpu", torch.bfloat16):
        call = fused_call(query, key, value)
        try:
            output = F.scaled_dot_product_attention(query, key, value)
        except RuntimeError:
            pytest.skip("this torch's autocast does not cast for its kernel")
        if ran:
            call = call.ran(output, lambda out: out)
            call.check("a module")
        assert output.dtype == torch.bfloat16
        for found in (call.weights(), call.kept().weights(), call.detached().weights()):
            assert found.dtype == torch.bfloat16
        (facets,) = call.facets(("query", "key", "value"))
        assert {tensor.dtype for tensor in facets.values()} == {torch.bfloat16}


def test_a_kernel_that_is_switched_off_leaves_the_dtype_of_autocast():
    kernels = pytest.importorskip("torch.nn.attention", reason="this torch has no sdpa_kernel")
    call = fused_call(*given([(B, H)] * 3, torch.float32))
    with (
        torch.autocast("cpu", torch.bfloat16),
        kernels.sdpa_kernel(kernels.SDPBackend.EFFICIENT_ATTENTION),
    ):
        assert call.weights().dtype == torch.bfloat16


def test_an_explicit_call_answers_with_its_matrix():
    query, key, value = given([(B, H)] * 3)
    matrix = softmax_of(query, key)
    call = ExplicitCall(matrix, value, query, key).ran(matrix @ value, lambda out: out)
    assert_answers(call, matrix, value)
    assert_same_bits(call.output, matrix @ value)
    assert call.weights() is matrix  # so that a gradient by it can be asked
    assert call.proofs("a module") == []
    (facets,) = call.facets(("query", "key", "value"))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        assert_same_bits(facets[name], tensor)
    half = ExplicitCall(matrix.bfloat16(), value.bfloat16())
    assert half.tile(0, slice(0, 1), slice(0, 2), torch.arange(2), torch.empty(0)).dtype == (
        torch.float32
    )
    assert half.gradients(torch.ones_like(matrix)).dtype == torch.bfloat16
    assert half.gradient_tile(half.matrix, 0, slice(0, 1), slice(0, 2)).dtype == torch.float32


@pytest.mark.parametrize("name", ["query", "key", "value", "bias"])
def test_autograd_follows_whatever_needs_it(name):
    query, key, value = given([(B, H)] * 3)
    bias = noise(Q, N, seed=3, dtype=torch.float64)
    leaf = {"query": query, "key": key, "value": value, "bias": bias}[name].requires_grad_()
    call = fused_call(query, key, value, bias)
    edited = editable(call).explicit()
    assert edited.weights() is edited.weights()  # so that a gradient by it can be asked
    assert call.weights().requires_grad == (name != "value")
    memory = []
    call.weights(new=lambda like, shape: memory.append(like) or torch.empty(shape).double())
    assert len(memory) == (name == "value")  # what autograd follows is not written in place
    output = edited.run(lambda: F.scaled_dot_product_attention(query, key, value, bias))
    cotangent = noise(B, H, Q, V, seed=7, dtype=torch.float64)
    (found,) = torch.autograd.grad(output, leaf, cotangent)
    (expected,) = torch.autograd.grad(softmax_of(query, key, bias) @ value, leaf, cotangent)
    assert_close(found, expected)


def all_of(call):
    """Return the tensors that ``call`` refers to."""
    parts = [all_of(part) for part in getattr(call, "parts", ()) if part is not call]
    own = [one for one in vars(call).values() if isinstance(one, torch.Tensor)]
    base = getattr(call, "base", None)
    return (
        own + (all_of(base) if base is not None else []) + [one for part in parts for one in part]
    )


def calls_of_all_kinds():
    query, key, value = (tensor.requires_grad_() for tensor in given([(B, H)] * 3))
    fused = fused_call(query, key, value)
    matrix = softmax_of(query, key)
    place = place_of(matrix, lambda gradient: gradient)
    hidden = torch.arange(N)[None] == 1
    put = editable(fused).with_weights((1,), fused.weights([1]) / 2)
    lists = FusedCall("a kernel", *(t[:1] for t in (query, query, query)), 0.3, OwnBlocks([2, 3]))
    return {
        "fused": fused,
        "explicit": ExplicitCall(matrix, value, query, key, place=place),
        "explicit of other scores": ExplicitCall(matrix, value, place=place),
        "nothing edited": editable(fused),
        "keys hidden": editable(fused).hide(None, hidden),
        "heads zero": editable(fused).zero([1]),
        "weights put in": put,
        "its own weights put in": editable(fused).explicit(),
        "a list": editable(lists).each(lambda part: part.zero([0])),
    }


@pytest.mark.parametrize("kind", calls_of_all_kinds())
def test_a_detached_call_keeps_its_weights_and_no_graph(kind):
    call = calls_of_all_kinds()[kind]
    shape = (1, H, Q, D) if kind == "a list" else (B, H, Q, V)
    output = noise(*shape, seed=4).double().requires_grad_() * 1
    call = call.ran(output, lambda out: out)
    assert call.place is not None
    assert_same_bits(call.output, output)
    detached = call.detached()
    assert detached.place is None
    assert detached.output is None
    assert not any(tensor.requires_grad for tensor in all_of(detached))
    found, expected = detached.weights(), call.weights()
    if kind != "a list":
        found, expected = [found], [expected]
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)


def test_a_detached_call_holds_no_output_that_was_made_with_its_weights():
    with torch.no_grad():
        call = calls_of_all_kinds()["its own weights put in"]
    assert call.mixed is not None
    assert call.detached().mixed is None


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in calls_of_all_kinds() if kind != "a list"])
def test_a_call_that_is_kept_holds_no_values_no_output_and_no_graph_of_it(kind, grad):
    output = noise(B, H, Q, V, seed=4).double().requires_grad_() * 1
    with torch.set_grad_enabled(grad):
        call = calls_of_all_kinds()[kind].ran(output, lambda out: out)
    kept = call.kept()
    assert (kept.output, kept.place) == (None, None)
    assert kept.value.shape[-2:] in ((N, D), (Q, N))
    assert not kind.startswith("explicit") or (kept.query, kept.key) == (None, None)
    assert V not in {tensor.shape[-1] for tensor in all_of(kept)}
    assert_same_bits(kept.weights(), call.weights())


@pytest.mark.parametrize("edit", [False, True])
def test_a_wrong_head_is_found_each_time_by_all_and_at_times_by_one(edit):
    query, key, value = given([(B, H)] * 3)
    call = fused_call(query, key, value)
    output = call.weights() @ value
    wrong = output.clone()
    wrong[1, 2] += 1
    if edit:
        call = editable(call).hide(None, torch.zeros(1, N, dtype=torch.bool))
    right, call = call.ran(output, lambda out: out), call.ran(wrong, lambda out: out)
    found = 0
    for _ in range(60):
        right.check("a module")
        right.check("a module", one_head=True)
        with pytest.raises(UnfaithfulError):
            call.check("a module")
        with pytest.raises(UnfaithfulError):
            verify(call.proofs("a module"))
        try:
            call.check("a module", one_head=True)
        except UnfaithfulError:
            found += 1
    assert 0 < found < 60


@pytest.mark.parametrize("length", [1, 3, 4, 5, 9])
def test_the_rows_of_a_proof_are_four_wherever_there_are_as_many(length):
    found = {tuple(range(length)[some_rows(length)]) for _ in range(300)}
    count = min(4, length)
    assert found == {tuple(range(i, i + count)) for i in range(length - count + 1)}


def test_a_difference_counts_from_the_size_of_roundings_on():
    proof = Proof("a kernel", "a module", 0.5, 0.01, torch.zeros(5))
    allowed = 0.01 * (1 + 0.5 * 4 * 3) * 8
    proof.read(allowed, 4, 3, 8, True)
    proof.read(0.0, 0, 0, 0, True)
    for error in (allowed * 1.001, math.inf, math.nan):
        with pytest.raises(UnfaithfulError):
            proof.read(error, 4, 3, 8, True)
    with pytest.raises(InvalidInputError, match="finite values at a kernel"):
        proof.read(0.0, 4, 3, 8, False)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_sample_of_no_finite_number_hides_no_other(number):
    query, key, value = given([(B, H)] * 3)
    output = fused_call(query, key, value).weights() @ value
    for tensor in (query, key, value, output):
        tensor[0] = number
    call = fused_call(query, key, value)
    call.ran(output, lambda out: out).check("a module")
    finite = value.clone()
    finite[0] = 1
    fused_call(query, key, finite).ran(output, lambda out: out).check("a module")
    wrong = output.clone()
    wrong[1] += 0.1
    with pytest.raises(UnfaithfulError):
        call.ran(wrong, lambda out: out).check("a module")


@contextmanager
def tf32(allowed):
    """Let products of float32 on GPUs round, or not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_a_small_difference_on_a_cpu_is_one_whatever_gpus_may_round():
    query, key, value = given([(B, H)] * 3, torch.float32)
    call = fused_call(query, key, value)
    wrong = call.ran(call.weights() @ value + 1e-3, lambda out: out)
    for allowed in (False, True):
        with tf32(allowed), pytest.raises(UnfaithfulError):
            wrong.check("a module")


def test_tensors_of_a_gpu_may_differ_by_its_rounding():
    """The tensors have no numbers, so no GPU is needed."""
    for dtype, allowed, expected in (
        (torch.float32, True, 2**-10),
        (torch.float32, False, 2**-23),
        (torch.bfloat16, True, 2**-7),
    ):
        with tf32(allowed), FakeTensorMode():
            query, key, value = (torch.empty(B, H, N, D, dtype=dtype, device="cuda") for _ in "qkv")
            call = fused_call(query, key, value).ran(value, lambda out: out)
            (proof,) = call.proofs("a module")
        assert proof.rounding == 16 * expected


def test_a_call_without_output_or_with_dropout_proves_nothing():
    query, key, value = given([(B, H)] * 3)
    wrong = noise(B, H, Q, V, seed=4).double()
    for call in (
        fused_call(query, key, value),
        fused_call(query, key, value, dropout_p=0.5).ran(wrong, lambda out: out),
        fused_call(query[0], key[0], value[0], dropout_p=0.5).ran(wrong[:1], lambda out: out),
    ):
        call.check("a module")
        assert call.proofs("a module") == []


def test_what_is_computed_is_where_the_call_is():
    """Not on the default device, which a user may set to another one."""
    query, key, value = given([(B, H)] * 3)
    hidden = torch.arange(N)[None] == 1
    call = fused_call(query, key, value, is_causal=True)
    expected = call.weights()
    with torch.device("meta"):
        assert_same_bits(call.weights(), expected)
        edited = editable(call).hide((1, 2), hidden).hide(None, hidden)
        found = edited.run(lambda: expected @ value)
        with torch.no_grad():
            own = editable(call).explicit()
    assert_close(own.weights(), expected)
    assert not edited.weights()[..., 1].any()
    assert_close(found, edited.weights() @ value)
