"""Weights made tile by tile are those made at once, however small the tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dinov2_attn._compat import MASKED_ROWS_ARE_ZERO
from dinov2_attn.backbone import projection
from dinov2_attn.math import attention
from tests.support.strategies import attention_cases, noise, seeds
from tests.support.tolerances import assert_close


@pytest.fixture
def tiny(monkeypatch):
    """Tiles and pieces of a few numbers, so that every cut is made."""

    def cut(size):
        monkeypatch.setattr(attention, "TILE_BYTES", size)
        monkeypatch.setattr(attention, "PIECE_BYTES", size)
        monkeypatch.setattr(projection, "TILE_BYTES", size)

    return cut


SIZES = st.sampled_from([1, 64, 300, 2000, 2**20])


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 7), st.integers(0, 9)),
    bias=st.sampled_from([None, (1, 1, 1, 1), (1, 1, 0, 0), (0, 0, 0, 0), (0, 1, 0, 0)]),
    causal=st.booleans(),
    heads=st.sampled_from([None, "mean"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    fresh=st.booleans(),
    shared=st.booleans(),
    together=st.booleans(),
    size=SIZES,
    seed=seeds,
)
def test_tiles_equal_the_whole(
    shape, bias, causal, heads, dtype, fresh, shared, together, size, seed
):
    """And so is their product with the values that is made beside them."""
    batch, count, rows, length = shape
    query = noise(batch, count, rows, 5, seed=seed, dtype=dtype)
    # Of one projection: the heads of a token lie side by side.
    both = noise(batch, length, 2, 1 if shared else count, 5, seed=seed + 1, dtype=dtype)
    key, value = both.permute(2, 0, 3, 1, 4)
    kwargs = {"heads": heads}
    if bias is not None:
        sizes = [1 if one else n for one, n in zip(bias, shape, strict=True)]
        kwargs["bias"] = noise(*sizes, seed=seed + 2)
    if causal:
        kwargs["causal_rows"] = torch.arange(rows)
    whole = attention.attention_weights(query, key, 0.7, **kwargs)
    output, out = None, torch.empty(shape, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for name in ("TILE_BYTES", "PIECE_BYTES", "KEY_BYTES"):
            patch.setattr(attention, name, size)
        patch.setattr(attention, "HEADS_BYTES", 2**20 if together else 0)
        patch.setattr(attention, "is_fresh", lambda result: fresh)
        tiled = attention.attention_weights(query, key, 0.7, **kwargs)
        if heads is None:
            del kwargs["heads"]
            output = attention.weights_and_output(query, key, value, 0.7, out=out, **kwargs)
    assert tiled.dtype == dtype
    assert_close(tiled, whole)
    if output is not None:
        assert_close(out, tiled)
        assert output.dtype == dtype
        size = float(value.abs().max()) if value.numel() else None
        assert_close(output, whole.double() @ value.double(), size=size)


@given(case=attention_cases(st.just(torch.float64)), size=SIZES, data=st.data())
def test_pieces_equal_the_whole(layers, case, size, data):
    module, tokens = case.build(layers)
    queries = data.draw(st.sampled_from([None, 0, [-1, 0]]))
    heads = data.draw(st.sampled_from([None, "mean"]))
    whole = module(tokens, return_attn=True, queries=queries, heads=heads)
    before = attention.TILE_BYTES, attention.PIECE_BYTES, projection.TILE_BYTES
    attention.TILE_BYTES = attention.PIECE_BYTES = projection.TILE_BYTES = size
    try:
        with torch.no_grad():
            assert_close(module(tokens, return_attn=True, queries=queries, heads=heads), whole)
    finally:
        attention.TILE_BYTES, attention.PIECE_BYTES, projection.TILE_BYTES = before


@torch.no_grad()
def test_a_piece_is_as_many_samples_as_fit(grafted, tiny):
    """Their queries and keys together; one where not even that fits, or where there is none."""
    module, tokens = grafted.attentions[0](12, num_heads=2), noise(5, 4, 12, seed=0)
    one = 2 * tokens[0].numel() * tokens.element_size()
    for size, count, expected in [
        (2 * one, 5, [2, 2, 1]),
        (2 * one - 1, 5, [1, 1, 1, 1, 1]),
        (1, 1, [1]),
        (1, 0, [0]),
    ]:
        tiny(size)
        pieces = projection.Projection(module, tokens[:count]).pieces(slice(None))
        assert [len(piece.query) for piece in pieces] == expected


@torch.no_grad()
@pytest.mark.parametrize("adorn", ["hook", "pre-hook", "global hook", "subclass", "forward"])
def test_another_module_at_qkv_is_called_once_with_all_tokens(layers, adorn, tiny):
    """Hooks, adapters and quantised layers see what upstream would show them."""
    tiny(1)
    module, tokens = layers.attentions[0](12, num_heads=2), noise(3, 4, 12, seed=0)
    seen, undo = [], None
    if adorn == "hook":
        module.qkv.register_forward_hook(lambda m, a, out: seen.append(len(a[0])))
    elif adorn == "pre-hook":
        module.qkv.register_forward_pre_hook(lambda m, a: seen.append(len(a[0])))
    elif adorn == "global hook":
        undo = nn.modules.module.register_module_forward_hook(
            lambda m, a, out: seen.append(len(a[0])) if m is module.qkv else None
        )
    elif adorn == "subclass":

        class Adapter(nn.Linear):
            def forward(self, x):
                seen.append(len(x))
                return super().forward(x)

        module.qkv.__class__ = Adapter
    else:
        plain = module.qkv.forward
        module.qkv.forward = lambda x: (seen.append(len(x)), plain(x))[1]
    module(tokens, return_attn=True)
    if undo is not None:
        undo.remove()
    assert seen == [3]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [None, "mean"])
def test_no_second_matrix_is_made(dtype, heads, monkeypatch):
    """The largest tensor beside the result is a tile; a result in float32 needs not even that."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not _shares_memory(out, result):
                self.largest = max(self.largest, out.numel() * out.element_size())
            return out

    monkeypatch.setattr(attention, "tile_bytes", lambda: 2**19)
    monkeypatch.setattr(attention, "is_fresh", lambda result: True)
    query = noise(2, 3, 400, 16, seed=0, dtype=dtype)
    result = torch.empty((2, 400, 400) if heads else (2, 3, 400, 400), dtype=dtype)
    with Watch() as watch:
        attention.attention_weights(query, query, 0.25, heads=heads, out=result)
    if heads is None and dtype == torch.float32:
        assert watch.largest <= query.numel() * 4
    else:
        assert 2**18 < watch.largest <= 2**19 < result.numel() * 4


@torch.no_grad()
@pytest.mark.parametrize(("fresh", "products"), [(True, 1), (False, 4)])
def test_scores_that_become_the_result_are_cut_into_fewer_pieces(fresh, products, monkeypatch):
    """Others stay in the cache: a tile for each head here, where one piece holds all."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.products += func in (torch.ops.aten.bmm.out, torch.ops.aten.mm.out)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(attention, "tile_bytes", lambda: 2**14)
    monkeypatch.setattr(attention, "PIECE_BYTES", 2**16)
    monkeypatch.setattr(attention, "is_fresh", lambda result: fresh)
    query = noise(1, 4, 64, 8, seed=0)
    with Count() as count:
        attention.attention_weights(query, query, 0.25)
    assert count.products == products


@pytest.mark.parametrize(
    ("shape", "rows", "samples", "sizes"),
    [
        ((4, 1, 1), 2, 4, [(2, 1, 1)] * 2),
        ((4, 1, 1), 9, 1, [(1, 1, 1)] * 4),
        ((1, 4, 1), 2, 1, [(1, 2, 1)] * 2),
        ((1, 3, 5), 4, 1, [(1, 1, 4), (1, 1, 1)] * 3),
        ((2, 3, 5), 99, 2, [(2, 3, 5)]),
        ((0, 3, 5), 99, 0, []),
    ],
)
def test_pieces_are_whole_samples_else_heads_else_rows(shape, rows, samples, sizes):
    pieces = attention._pieces(shape, rows, samples=samples, heads_last=False)
    assert [tuple(cut.stop - cut.start for cut in piece) for piece in pieces] == sizes


def test_all_heads_of_some_rows_come_before_the_next_rows():
    pieces = attention._pieces((1, 2, 5), 4, samples=1, heads_last=True)
    places = [(heads.start, lines.start) for _, heads, lines in pieces]
    assert places == [(0, 0), (1, 0), (0, 4), (1, 4)]


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2**20])
def test_keys_of_a_batch_are_not_copied(size, monkeypatch):
    """Samples are taken one by one instead, if they are large."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= key.numel() // 2:
                self.found += not _shares_memory(out, key)
            return out

    monkeypatch.setattr(attention, "KEY_BYTES", size)
    query, key = noise(2, 3, 1, 8, seed=0), noise(2, 50, 3, 8, seed=1).transpose(1, 2)
    with Copies() as copies:
        weights = attention.attention_weights(query, key, 0.25)
    assert (copies.found == 0) == (size == 1)
    assert_close(weights, (query.double() * 0.25 @ key.double().mT).softmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("fresh", [True, False])
def test_heads_that_share_their_keys_are_cut_too(fresh, tiny, monkeypatch):
    monkeypatch.setattr(attention, "is_fresh", lambda result: fresh)
    query, key = noise(2, 3, 5, 4, seed=0), noise(2, 1, 6, 4, seed=1)
    whole = (query.double() * 0.5 @ key.double().mT).softmax(-1)
    for rows in range(1, 31):
        tiny(rows * 6 * 4)
        assert_close(attention.attention_weights(query, key, 0.5), whole)


class Elsewhere(torch.Tensor):
    """A tensor of the CPU that says it lies on a device which is not here."""

    @property
    def device(self):
        return torch.device("mps")


@torch.no_grad()
def test_other_devices_take_the_softmax_of_the_same_rows():
    """Their kernels are not known to read all of a row before they write any of it."""
    scores, out = noise(2, 3, 4, 5, seed=0), torch.empty(2, 3, 4, 5)
    attention._softmax_into(out, scores.as_subclass(Elsewhere), biased=False)
    assert_close(out, scores.double().softmax(-1))


@torch.no_grad()
def test_a_result_on_huge_pages_is_like_any_other():
    """Large enough that its pages are asked for; what is refused is passed over."""
    query = noise(1, 2, 1500, 8, seed=0)
    weights = attention.attention_weights(query, query, 0.3)
    assert weights.numel() * 4 > 2**22
    assert_close(weights, (query.double() * 0.3 @ query.double().mT).softmax(-1))


def _shares_memory(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _masks_of(kind, rows, length):
    """A bias with a row of no keys, and rows in a sequence."""
    bias = noise(2, 3, rows, length, seed=4)
    bias[1, :, rows // 3] = -torch.inf
    masks = {"bias": bias, "causal_rows": torch.arange(rows)}
    return {name: mask for name, mask in masks.items() if name in kind}


def _without_keyless(found):
    """Rows without keys are NaN before PyTorch 2.5, and zero since."""
    return found if MASKED_ROWS_ARE_ZERO else found.nan_to_num(0)


def _defined(query, key, kind, masks):
    """Weights by their definition in float64: rows without keys are zero."""
    scores = query.double() * 0.7 @ key.double().mT + masks.get("bias", torch.zeros(())).double()
    if "causal_rows" in kind:
        later = torch.arange(key.shape[2]) > torch.arange(query.shape[2])[:, None]
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(-1).nan_to_num(0)


@pytest.mark.parametrize("kind", [(), ("bias",), ("causal_rows",), ("bias", "causal_rows")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [None, "mean"])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize(("grad", "size"), [(True, 1), (False, 1), (False, 200), (False, 2**20)])
def test_weights_are_their_definition(kind, dtype, heads, rows, grad, size, tiny):
    tiny(size)
    query, key = (noise(2, 3, n, 5, seed=n, dtype=dtype) for n in (rows, 7))
    masks = _masks_of(kind, rows, 7)
    with torch.set_grad_enabled(grad):
        found = attention.attention_weights(query, key, 0.7, heads=heads, **masks)
    expected = _defined(query, key, kind, masks)
    assert found.dtype == dtype
    assert_close(_without_keyless(found), expected.mean(1) if heads else expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", [(), ("bias",), ("causal_rows",), ("bias", "causal_rows")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "together"), [(1, 0), (64, 2**20), (2**20, 2**20)])
def test_weights_and_their_product_with_the_values(kind, dtype, size, together, tiny, monkeypatch):
    """The same by tiles, by the heads of a sample, and in one tile."""
    tiny(size)
    monkeypatch.setattr(attention, "HEADS_BYTES", together)
    query, key, value = (noise(2, 3, n, 5, seed=n, dtype=dtype) for n in (6, 7, 7))
    masks, out = _masks_of(kind, 6, 7), torch.full((2, 3, 6, 7), torch.nan, dtype=dtype)
    output = attention.weights_and_output(query, key, value + 1, 0.7, out=out, **masks)
    expected = _defined(query, key, kind, masks)
    assert (out.dtype, output.dtype) == (dtype, dtype)
    assert_close(_without_keyless(out), expected)
    size = float(value.abs().max()) + 1
    assert_close(_without_keyless(output), expected @ (value.double() + 1), size=size)


@torch.no_grad()
@pytest.mark.parametrize(("more", "together"), [(0, True), (-1, False)])
def test_heads_of_several_tiles_are_multiplied_together_if_they_are_not_too_many(
    more, together, monkeypatch
):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        heads = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "mm" in func.__name__ and out.shape[-1] == 7:
                self.heads = max(self.heads, len(out) if out.ndim == 3 else 1)
            return out

    query, value = noise(2, 3, 50, 5, seed=0), noise(2, 3, 50, 7, seed=1)
    each = 3 * 50 * 50 * 4
    monkeypatch.setattr(attention, "tile_bytes", lambda: each - 1)
    monkeypatch.setattr(attention, "HEADS_BYTES", each + more)
    monkeypatch.setattr(attention, "KEY_BYTES", 1)
    with Products() as products:
        attention.weights_and_output(query, query, value, 0.3, out=torch.empty(2, 3, 50, 50))
    assert (products.heads == 3) == together


@torch.no_grad()
def test_what_fits_into_a_tile_takes_the_same_few_steps(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Steps(TorchDispatchMode):
        count = matrices = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.numel() >= out.numel():
                self.matrices += not _shares_memory(made, out)
            return made

    monkeypatch.setattr(attention, "is_fresh", lambda result: False)
    counts = []
    for batch, heads in ((2, 3), (3, 3), (1, 4)):
        query, size = noise(batch, heads, 6, 5, seed=0), batch * heads * 6 * 6 * 4
        out = query.new_empty(batch, heads, 6, 6)
        for limit in (size, size + 5, 2**30):
            monkeypatch.setattr(attention, "tile_bytes", lambda limit=limit: limit)
            with Steps() as steps:
                attention.attention_weights(query, query, 0.3, out=out)
            counts.append(steps.count)
            assert not steps.matrices
    assert len(set(counts)) == 1
    monkeypatch.setattr(attention, "tile_bytes", lambda: size - 1)
    with Steps() as steps:
        attention.attention_weights(query, query, 0.3, out=out)
    assert steps.count > counts[0]


def _inside(*inputs):
    with attention.without_needless_grad(*inputs):
        return torch.is_grad_enabled()


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is:FutureWarning")
def test_grad_is_off_inside_where_no_input_needs_it():
    plain, needing = noise(2, seed=0), noise(2, seed=0).requires_grad_()
    assert not _inside(plain, None, plain)
    assert not _inside()
    assert _inside(plain, needing)
    assert _inside(plain, [plain])  # of which it is not known
    with torch.no_grad():
        assert not _inside(plain)
        assert not _inside(needing)
    assert torch.is_grad_enabled()
    seen = []
    torch.func.vmap(lambda one: (seen.append(_inside(plain)), one)[1])(plain)
    assert seen == [True]
    torch.jit.trace(lambda one: (seen.append(_inside(plain)), one * 2)[1], plain, check_trace=False)
    assert seen == [True, True]


def test_tiles_grow_with_more_than_eight_threads(monkeypatch):
    sizes = []
    for threads in (1, 8, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        sizes.append(attention.tile_bytes())
    assert sizes == [attention.TILE_BYTES, attention.TILE_BYTES, 2 * attention.TILE_BYTES]


@torch.no_grad()
def test_the_mean_of_many_heads_is_rounded_once(tiny):
    """Heads are added one by one, in float32 for a result in half precision."""
    tiny(1)
    query, key = (noise(1, 64, 5, 4, seed=n, dtype=torch.bfloat16) for n in (0, 1))
    found = attention.attention_weights(query, key, 0.1, heads="mean")
    expected = (query.double() * 0.1 @ key.double().mT).softmax(-1).mean(1)
    assert_close(found, expected, within=float(expected.max()) * 2**-8)


@torch.no_grad()
@pytest.mark.parametrize(("shared", "copies"), [(False, 6), (True, 2)])
def test_keys_are_copied_once_for_all_pieces_of_their_heads(shared, copies, tiny):
    """Into the order of the product. Where all fits into one piece nothing is copied."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found += func is torch.ops.aten.clone.default
            return func(*args, **(kwargs or {}))

    query, key = noise(2, 3, 6, 5, seed=0), noise(2, 1 if shared else 3, 8, 5, seed=1)
    for size, expected in ((2 * 8 * 4, copies), (6 * 8 * 4, 0)):
        tiny(size)
        with Copies() as watch:
            attention.attention_weights(query, key, 0.3)
        assert watch.found == expected


@torch.no_grad()
def test_samples_whose_keys_lie_side_by_side_are_one_product(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found += func in (torch.ops.aten.bmm.out, torch.ops.aten.mm.out)
            return func(*args, **(kwargs or {}))

    query, key = noise(4, 3, 6, 5, seed=0), noise(4, 3, 8, 5, seed=1)
    apart = noise(4, 8, 3, 5, seed=1).transpose(1, 2)
    bytes_of = 3 * 8 * 5 * 4
    for keys, least, products in (
        (key, 1, 1),
        (key[:, :1], 1, 1),
        (apart, bytes_of, 4),
        (apart, bytes_of + 1, 1),
        (apart[:, :2], 1, 4),
        (apart[:1], 1, 1),
    ):
        monkeypatch.setattr(attention, "KEY_BYTES", least)
        heads = keys.shape[1] if keys.shape[1] > 1 else 3
        with Products() as watch:
            attention.attention_weights(query[: len(keys), :heads], keys, 0.3)
        assert watch.found == products


def test_autocast_is_known_where_pytorch_says_it():
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert not attention.may_autocast(cpu)
    assert attention.may_autocast(other)  # it is not known
    with torch.autocast("cpu", torch.bfloat16):
        assert attention.may_autocast(cpu)
        with attention.without_autocast(cpu):
            assert not attention.may_autocast(cpu)
        with attention.without_autocast(other):
            assert attention.may_autocast(cpu)
        assert attention.may_autocast(cpu)
