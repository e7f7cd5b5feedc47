"""A rollout by vectors is the textbook's product of matrices."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import dinov2_attn
from dinov2_attn.backbone.structure import Role, role_of_module
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.grafting.modules import Returns, queries_and_keys_from
from dinov2_attn.kernels.call import FusedCall
from dinov2_attn.maps import rollout as module_of_rollout
from dinov2_attn.maps import tiles
from tests.support import reference, upstreams
from tests.support.installing import uninstalled
from tests.support.strategies import ModelCase, model_cases, noise, randomise
from tests.support.tolerances import assert_close

FUSE = {"mean": np.mean, "min": np.min, "max": np.max}
RESIDUAL = st.sampled_from([0.0, 0.25, 0.5, 1.0])


def textbook(model, images, *, heads="mean", residual=0.5, n=None, masks=None):
    """The product ``(B, N, N)`` in NumPy and float64, of upstream's own forward pass."""
    attentions = [m for m in model.modules() if role_of_module(m) is Role.ATTENTION]
    seen = []
    hooks = [m.register_forward_pre_hook(lambda _, a: seen.append(a[0])) for m in attentions]
    with torch.no_grad():
        model.forward_features(images, masks)
        for hook in hooks:
            hook.remove()
        layers = [reference.weights(*pair) for pair in zip(attentions, seen, strict=True)]
    product = np.eye(layers[0].shape[-1])
    for i in range(len(layers)) if n is None else n:
        fused = FUSE[heads](layers[i].numpy(), axis=1)
        mixed = residual * np.eye(len(product[-1])) + (1 - residual) * fused
        product = mixed / mixed.sum(-1, keepdims=True) @ product
    return torch.from_numpy(product)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """A few rows at a time, so that every cut is made; one test below restores them."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 500)


@given(case=model_cases(), heads=st.sampled_from(list(FUSE)), residual=RESIDUAL)
def test_the_rollout_of_cls_is_its_row_of_the_product(models, case, heads, residual):
    model = case.build(models)
    ours = dinov2_attn.rollout(model, case.images, heads=heads, residual=residual)
    expected = textbook(model, case.images, heads=heads, residual=residual)[:, :1]
    assert ours.weights.dtype == case.dtype
    assert_close(ours.weights, expected)
    assert_close(ours.weights.sum(-1), torch.ones(case.batch, 1))
    assert not ours.weights.requires_grad


@given(case=model_cases(), data=st.data())
def test_any_tokens_may_start(models, case, data):
    model, prefix = case.build(models), case.prefix(models)
    length = prefix + case.grid[0] * case.grid[1]
    positions = st.integers(-length, length - 1)
    words = {"cls": slice(0, 1), "registers": slice(1, prefix), "patches": slice(prefix, None)}
    queries = data.draw(
        st.sampled_from([None, *words]) | positions | st.lists(positions) | st.slices(length)
    )
    rows = words.get(queries, queries) if isinstance(queries, str) else queries
    if rows is None:
        rows = slice(None)
    rows = list(range(length))[rows] if isinstance(rows, slice) else rows
    rows = rows if isinstance(rows, list) else [rows]
    ours = dinov2_attn.rollout(model, case.images, queries=queries)
    assert_close(ours.weights, textbook(model, case.images)[:, rows])


@given(case=model_cases(st.just(torch.float64)), data=st.data())
def test_only_some_blocks_may_be_rolled_out(models, case, data):
    model = case.build(models)
    last = data.draw(st.integers(1, case.depth))
    some = data.draw(st.lists(st.integers(0, case.depth - 1), min_size=1, unique=True))
    for n, blocks in ((last, range(case.depth - last, case.depth)), (some, sorted(some))):
        ours = dinov2_attn.rollout(model, case.images, n, queries=[0, -1])
        assert_close(ours.weights, textbook(model, case.images, n=blocks)[:, [0, -1]])


@given(case=model_cases())
def test_registers_stay_out_of_the_picture_but_not_of_the_mathematics(models, case):
    model, prefix = case.build(models), case.prefix(models)
    ours = dinov2_attn.rollout(model, case.images, masks=case.masks)
    assert (ours.prefix, ours.grid) == (prefix, case.grid)
    assert ours.weights.shape == (case.batch, 1, prefix + case.grid[0] * case.grid[1])
    expected = textbook(model, case.images, masks=case.masks)[:, :1, prefix:]
    assert_close(ours.patch_maps(), expected.reshape(case.batch, 1, *case.grid))
    assert (ours.patch_maps().sum((-2, -1)) < 1).all()


@given(case=model_cases(st.just(torch.float64)))
def test_a_list_equals_one_by_one_and_chunked_equals_flat(models, case):
    images = [case.images, case.images[..., : case.patch, : case.patch]]
    flat = case.build(models, chunks=0)
    each = [dinov2_attn.rollout(flat, one) for one in images]
    for model in (flat, case.build(models)):
        for ours, alone in zip(dinov2_attn.rollout(model, images), each, strict=True):
            assert_close(ours.weights, alone.weights)
            assert ours.grid == alone.grid


PLAIN = ModelCase(
    depth=4, chunks=0, registers=4, heads=3, grid=(9, 12), batch=2, dtype=torch.float32, seed=3
)


@pytest.mark.parametrize("heads", FUSE)
def test_float32_is_right_to_1e_6(models, heads, monkeypatch):
    monkeypatch.undo()  # tiles as they are
    model = PLAIN.build(models)
    ours = dinov2_attn.rollout(model, PLAIN.images, heads=heads, queries=[0, 5]).weights
    # The reference's layers are those of the float32 pass; its product is in float64.
    expected = textbook(model, PLAIN.images, heads=heads)[:, [0, 5]]
    assert (ours.double() - expected).abs().max() < 1e-6


def test_half_precision_is_rolled_out_in_float32(models):
    model = PLAIN.build(models).bfloat16()
    if models is upstreams.LIGHTLY:
        pytest.skip("LightlyTrain interpolates in the dtype of the model")
    try:
        ours = dinov2_attn.rollout(model, PLAIN.images.bfloat16())
    except RuntimeError as error:
        if "only supported when avx512" not in str(error):
            raise
        # With ATEN_CPU_CAPABILITY=default alone, on a processor with AVX-512. Other settings run.
        pytest.skip(f"PyTorch's own kernel fails on bfloat16 here: {error}")
    assert ours.weights.dtype == torch.float32
    # Queries and keys of the two ways are rounded to bfloat16, and the rest is not.
    expected = textbook(model, PLAIN.images.bfloat16())[:, :1]
    assert_close(ours.weights, expected, dtype=torch.bfloat16)
    assert_close(ours.weights.sum(-1), torch.ones(ours.weights.shape[:-1]))


def test_shares_are_made_where_the_images_are(models):
    """On a device that only this machine's lacks: nothing may be made on the CPU in between."""
    ours = dinov2_attn.rollout(PLAIN.build(models).to("meta"), PLAIN.images.to("meta"))
    assert (ours.weights.device.type, ours.weights.shape[:2]) == ("meta", (2, 1))


def test_hooks_and_adapters_at_qkv_count(models):
    model = PLAIN.build(models)
    plain = dinov2_attn.rollout(model, PLAIN.images).weights
    model.blocks[1].attn.qkv.register_forward_hook(lambda m, a, out: out * 1.5)
    ours = dinov2_attn.rollout(model, PLAIN.images).weights
    assert_close(ours, textbook(model, PLAIN.images)[:, :1])
    assert (ours - plain).abs().max() > 1e-5


class Largest(TorchDispatchMode):
    """Watches the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.untyped_storage().nbytes())
        return out


@pytest.fixture
def largest(monkeypatch):
    """The largest tensor behind the pass itself, where tiles have 64 KiB."""

    def watched(*args):
        with largest:
            return plain(*args)

    largest, plain = Largest(), module_of_rollout._one
    monkeypatch.setattr(module_of_rollout, "_one", watched)
    monkeypatch.setattr(tiles, "TILE_BYTES", 2**16)
    return largest


WIDE = ModelCase(2, 0, 0, 2, (20, 20), 1, torch.float32, 0)


@pytest.mark.parametrize("heads", FUSE)
def test_no_matrix_is_made(models, heads, largest):
    """The largest tensor is one layer's projection, or one tile."""
    model = WIDE.build(models).requires_grad_(False)
    dinov2_attn.rollout(model, WIDE.images, heads=heads)
    assert 2**15 < largest.size <= 2**16 < 401**2 * 4


@pytest.mark.parametrize("heads", FUSE)
def test_tiles_of_half_precision_are_counted_in_float32(grafted, heads, largest):
    model = WIDE.build(grafted).requires_grad_(False).bfloat16()
    dinov2_attn.rollout(model, WIDE.images.bfloat16(), heads=heads)
    assert 2**15 < largest.size <= 2**16


@torch.no_grad()
def test_tiles_are_made_in_one_memory():
    """Fresh memory costs as much as what is written into it."""
    query, key = noise(1, 2, 30, 4, seed=0), noise(1, 2, 30, 4, seed=1)
    call, layer = FusedCall("", query, key, key, 1.0), module_of_rollout.Layer("mean", 0.5)
    tiles = [rows for _, rows, _ in layer._fused(call, 0, torch.arange(30))]
    assert len({rows.untyped_storage().data_ptr() for rows in tiles}) == 1 < len(tiles)


def test_the_last_block_runs_norm_and_projection_only(grafted):
    model, ran = PLAIN.build(grafted), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    for n, last in ((None, 3), ([0, 2], 2)):
        dinov2_attn.rollout(model, PLAIN.images, n)
        of_last = [name for name in ran if name.startswith(f"blocks.{last}")]
        parts = ("norm1", "attn.qkv", "attn")
        assert of_last == [*(f"blocks.{last}.{part}" for part in parts), f"blocks.{last}"]
        assert f"blocks.{last + 1}" not in ran
        ran.clear()


def test_the_tokens_of_the_first_block_are_not_kept(grafted):
    """Images give them again, where a pass of a large batch has little memory left."""
    model, kept = PLAIN.build(grafted), []
    model.blocks[0].register_forward_pre_hook(lambda _, args: kept.append(weakref.ref(args[0])))
    alive = []
    model.blocks[1].register_forward_pre_hook(lambda *_: alive.append(kept[-1]() is not None))
    dinov2_attn.rollout(model, PLAIN.images)
    assert not any(alive)
    assert alive


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"heads": None}, r"one of 'mean', 'min', 'max'\.\nFound heads=None"),
        ({"heads": "median"}, r"Found heads='median'"),
        ({"residual": 1.5}, r"residual as a number from 0 to 1\.\nFound 1.5"),
        ({"residual": float("nan")}, r"Found nan"),
        ({"residual": "half"}, r"Found 'half'"),
        ({"queries": 113}, r"there being [0-9]+ tokens\.\nFound 113"),
        ({"queries": "CLS"}, r"Found 'CLS'"),
        ({"layers": 0}, r"(?s)at least one block.*layers=0"),
        ({"layers": [4]}, r"blocks between -4 and 3"),
        ({"masks": torch.ones(2, 3)}, r"masks as a boolean tensor"),
    ],
)
def test_what_cannot_be_is_refused(models, options, expected):
    model = PLAIN.build(models)
    with pytest.raises(InvalidInputError, match=expected):
        dinov2_attn.rollout(model, PLAIN.images, **options)


def test_a_model_that_install_has_not_reached_answers_from_its_own_pass(models):
    model = PLAIN.build(models).double()
    expected = textbook(model, PLAIN.images.double(), masks=PLAIN.masks)[:, :1]
    with uninstalled():
        ours = dinov2_attn.rollout(model, PLAIN.images.double(), masks=PLAIN.masks)
    assert_close(ours.weights, expected)


@pytest.mark.parametrize("heads", FUSE)
@pytest.mark.parametrize("queries", ["cls", [5, -1], None])
def test_the_lowest_weights_may_be_discarded_block_by_block_too(grafted, heads, queries):
    model, images = PLAIN.build(grafted).double(), PLAIN.images[..., :6, :8].double()
    for ratio in (0.3, 0.9):
        options = {"heads": heads, "queries": queries, "discard_ratio": ratio}
        ours = dinov2_attn.rollout(model, images, **options)
        with uninstalled():
            expected = dinov2_attn.rollout(model, images, **options)
        assert_close(ours.weights, expected.weights)
        assert ours.queries == expected.queries


@torch.no_grad()
def test_causal_blocks_are_rolled_out_with_their_mask():
    """In a grafted model too, whose blocks could be asked for queries and keys."""
    upstream = upstreams.ANOMALIB
    model = PLAIN.build(upstreams.MOGE).double()
    width, heads = model.embed_dim, model.num_heads
    for number, block in enumerate(model.blocks):
        causal = upstream.cls("CausalAttentionBlock")(width, num_heads=heads)
        model.blocks[number] = randomise(causal.double(), number).train(block.training)
    images = PLAIN.images.double()
    with dinov2_attn.install(upstreams.MOGE.package), dinov2_attn.install(upstream.package):
        layers = model.get_self_attention(images)
        assert_close(layers[0].triu(1), torch.zeros_like(layers[0]))
        product = torch.eye(layers[0].shape[-1], dtype=torch.float64)
        for weights in layers:
            mixed = (weights.mean(1) + torch.eye(weights.shape[-1])) / 2
            product = mixed / mixed.sum(-1, keepdim=True) @ product
        assert_close(dinov2_attn.rollout(model, images, queries=slice(None)).weights, product)
        received = dinov2_attn.artifact_tokens(model, images).from_all.flatten(1)
        assert_close(received, layers[-1].mean((1, 2))[:, -received.shape[1] :])


@torch.no_grad()
def test_causal_blocks_and_biases_are_refused():
    """Their queries and keys alone do not say what is seen."""
    upstream = upstreams.ANOMALIB
    with dinov2_attn.install(upstream.package):
        block = randomise(upstream.cls("CausalAttentionBlock")(12, num_heads=2), 5)
        with pytest.raises(InvalidInputError, match=r"alike\.\nFound a causal block"):
            queries_and_keys_from(block, noise(2, 7, 12, seed=5), None)
        module = upstream.cls("MemEffAttention")(12, num_heads=2)
        with pytest.raises(InvalidInputError, match="alike.\nFound one with attn_bias"):
            module(noise(2, 7, 12, seed=5), torch.zeros(7, 7), return_attn=Returns.QUERIES_AND_KEYS)
