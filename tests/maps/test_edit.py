"""`edit` on real models: against passes whose attention is written out and changed by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dinov2_attn import attention_maps, edit, record, rollout
from tests.maps.test_any_model import build as build_other
from tests.maps.test_record_any_model import TRANSFORMERS, Aggregator
from tests.support import dinov3, models_at_kernel, upstreams
from tests.support.eager import Eager, eager_attention
from tests.support.recordings import IMAGES, N, assert_all_close, assert_nothing_on, build
from tests.support.strategies import noise, randomise
from tests.support.tolerances import assert_close, assert_same_bits, same_bits

DEPTH, HEADS = 3, 2


@pytest.fixture(params=upstreams.WITH_MODELS, ids=str)
def plain(request):
    """A copy of the code without grafts."""
    return request.param


def only(layers, change):
    """Return the function that changes the matrices of ``layers`` only."""
    return lambda number, weights: change(weights) if number in layers else weights


def without_heads(heads):
    def change(weights):
        return torch.stack(
            [w * (head not in heads) for head, w in enumerate(weights.unbind(1))], dim=1
        )

    return change


def without_keys(keys, queries=None):
    def change(weights):
        rows = range(weights.shape[2]) if queries is None else queries
        lines = list(weights.unbind(2))
        for row in rows:
            left = lines[row] * torch.tensor([k not in keys for k in range(weights.shape[3])])
            lines[row] = left / left.sum(-1, keepdim=True)
        return torch.stack(lines, dim=2)

    return change


def sharper(weights):
    return weights**2 / (weights**2).sum(-1, keepdim=True)


def rows_only(change, rows):
    def changed(weights):
        lines, others = list(weights.unbind(2)), change(weights).unbind(2)
        for row in rows:
            lines[row] = others[row]
        return torch.stack(lines, dim=2)

    return changed


# Arguments of `edit`, and what they do to the matrix of each layer of a model with N tokens.
EDITS = {
    "a head": ({"heads": {1: [0]}}, only([1], without_heads([0]))),
    "heads of all layers": ({"heads": 1}, only(range(3), without_heads([1]))),
    "heads from the end": ({"heads": {-1: (-1,), 0: 0}}, None),
    "keys": ({"keys": [2, 3], "layers": [0, 2]}, only([0, 2], without_keys([2, 3]))),
    "keys of a query": (
        {"keys": "patches", "queries": "cls"},
        only(range(3), without_keys(range(1, N), [0])),
    ),
    "keys of patches": (
        {"keys": slice(2, 5), "queries": "patches", "layers": 2},
        only([1, 2], without_keys([2, 3, 4], range(1, N))),
    ),
    "weights": (
        {"weights": lambda _, weights: sharper(weights), "layers": [1]},
        only([1], sharper),
    ),
    "weights of rows": (
        {"weights": lambda _, weights: sharper(weights), "queries": [4, 0]},
        only(range(3), rows_only(sharper, [0, 4])),
    ),
}
EDITS["heads from the end"] = (
    EDITS["heads from the end"][0],
    lambda number, weights: (
        without_heads([1])(weights)
        if number == 2
        else without_heads([0])(weights)
        if number == 0
        else weights
    ),
)


@pytest.mark.parametrize("kind", EDITS)
def test_upstreams_features_are_those_of_the_edited_matrices(plain, kind):
    model = build(plain)
    arguments, change = EDITS[kind]
    with eager_attention(model, change):
        expected = model(IMAGES)
    unedited = model(IMAGES)
    with edit(model, **arguments) as report:
        output = model(IMAGES)
    assert_close(output, expected)
    assert not same_bits(output, unedited)
    assert set(report.calls.values()) == {1}
    assert_same_bits(model(IMAGES), unedited)
    assert_nothing_on(model)


@pytest.mark.parametrize("kind", EDITS)
def test_a_recording_sees_the_edited_weights_whichever_is_inside(plain, kind):
    model = build(plain)
    arguments, change = EDITS[kind]
    seen = []

    def keep(number, weights):
        seen.append(change(number, weights))
        return seen[-1]

    with eager_attention(model, keep):
        model(IMAGES)
    with edit(model, **arguments), record(model, check="every") as maps:
        inner = model(IMAGES)
    assert_all_close(maps.weights, seen)
    with record(model, queries=[0, 3], heads="mean") as maps, edit(model, **arguments):
        assert_same_bits(model(IMAGES), inner)
    assert_all_close(maps.weights, [weights[:, :, [0, 3]].mean(1) for weights in seen])
    with edit(model, **arguments):
        assert_all_close(attention_maps(model, IMAGES, [0, 2]).weights, [seen[0], seen[2]])


@pytest.mark.parametrize("kind", EDITS)
def test_installed_models_answer_with_edited_weights(grafted, kind):
    model = build(grafted)
    arguments, _ = EDITS[kind]
    with edit(model, **arguments):
        with record(model) as maps:
            output = model(IMAGES)
        assert_all_close(model.get_self_attention(IMAGES), maps.weights)
        assert_close(model.get_last_self_attention(IMAGES), maps.weights[-1])
        tokens = noise(1, 5, 8, seed=3, dtype=torch.float64)
        with record(model.blocks[0].attn) as own:
            model.blocks[0].attn(tokens)
    found = edit(model, **arguments)
    with found:
        again, attentions = model(IMAGES, return_attention=True)
        asked = attention_maps(model, IMAGES)
        rolled = rollout(model, IMAGES, queries="cls").weights
    assert_same_bits(again, output)
    assert_all_close(attentions, maps.weights)
    assert_all_close(asked.weights, maps.weights)
    product = torch.eye(N, dtype=torch.float64)
    for weights in maps.weights:
        layer = (torch.eye(N) + weights.mean(1)) / 2
        product = layer / layer.sum(-1, keepdim=True) @ product
    assert_close(rolled, product[:, :1])
    assert len(own.weights) == 1


OTHERS = [*TRANSFORMERS, "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_models_of_other_libraries(name, explicit):
    model, images = build_other(name, dtype=torch.float64)
    heads = 2 if name in TRANSFORMERS else 6
    prefix = attention_maps(model, images).prefix
    edits = {
        "heads": ({"heads": {-1: [heads - 1]}}, only([2], without_heads([heads - 1]))),
        "keys": (
            {"keys": [2, 7], "queries": [0, 5]},
            only(range(3), without_keys([2, 7], [0, 5])),
        ),
        "names": (
            {"keys": "registers", "queries": "cls", "layers": [0]},
            only([0], without_keys(range(1, prefix), [0])),
        ),
        "weights": (
            {"weights": lambda _, weights: sharper(weights), "layers": [0, 1]},
            only([0, 1], sharper),
        ),
    }
    # Their fused code, with the textbook's attention in place of the kernel.
    expected = {}
    for kind, (_, change) in edits.items():
        with Eager(change) as mode:
            expected[kind] = features(model, images)
        assert mode.calls == 3
    if explicit:
        model = explicitly(name, model)
    for kind, (arguments, _) in edits.items():
        with edit(model, **arguments), record(model, check="every") as maps:
            output = features(model, images)
        assert_close(output, expected[kind])
        assert len(maps.layers) == 3
        assert_nothing_on(model)


def features(model, images):
    output = model(images)
    return getattr(output, "last_hidden_state", output)


def explicitly(name, model):
    """Return the same model with its own explicit code."""
    if name in TRANSFORMERS:
        other, _ = build_other(name, "eager", torch.float64)
        other.load_state_dict(model.state_dict())
        return other
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


@torch.no_grad()
def test_dinov3s_own_code_with_its_rotation_and_storage_tokens():
    code = dinov3.LIGHTLY.load()
    model, images = code.build().double(), dinov3.IMAGES.double()
    heads = {0: [1], 2: [0, 2]}
    hide = only(range(3), without_keys(range(1, 5), range(5, 15)))
    edits = [
        ({"heads": heads}, lambda i, weights: without_heads(heads.get(i, []))(weights)),
        ({"keys": "registers", "queries": "patches"}, hide),
    ]
    for arguments, change in edits:
        with Eager(change):
            expected = model(images)
        with edit(model, **arguments), record(model, check="every"):
            assert_close(model(images), expected)
        # Lists run through forward_list in training, and through forward one by one here.
        with edit(model, **arguments):
            batches = model.forward_features([images, images[:1]], [None, None])
        with edit(model, **arguments):
            one = model.forward_features(images[:1])
        assert_close(batches[1]["x_norm_patchtokens"], one["x_norm_patchtokens"])


def test_norms_biases_and_causal_masks_of_the_module_stay():
    for options in ({"bias": True}, {"causal": True}, {"bias": True, "registers": 0}, {}):
        model = models_at_kernel.build(upstreams.FIRST, **options)
        images = noise(2, 3, 8, 8, seed=0, dtype=torch.float64)
        with record(model) as maps:
            model(images)
        first = maps.weights[0].detach()
        with edit(model, [0], keys=[3, 4], queries=[2, 7]), record(model, check="every") as maps:
            model(images)
        assert_close(maps.weights[0], without_keys([3, 4], [2, 7])(first))
        with edit(model, [0], keys=[3, 4]), record(model, check="every") as maps:
            model(images)
        assert_close(maps.weights[0], without_keys([3, 4])(first))


def test_a_frozen_pattern_is_that_of_the_other_image(plain):
    model = build(plain)
    other = IMAGES.flip(-1)
    maps = attention_maps(model, other)
    with eager_attention(model, lambda number, _: maps.weights[number].detach()):
        expected = model(IMAGES)
    with edit(model, frozen=maps):
        assert_close(model(IMAGES), expected)
    with edit(model, frozen=maps), record(model) as found:
        model(IMAGES)
    assert_same_bits(found.weights, maps.weights)
    # Rows of one layer; one image for a batch of any size.
    rows = attention_maps(model, other[:1], [1], queries=[2, 0])

    def change(number, weights):
        if number != 1:
            return weights
        lines = list(weights.unbind(2))
        for place, row in enumerate([2, 0]):
            lines[row] = rows.weights[0][:, :, place].detach().expand(2, -1, -1)
        return torch.stack(lines, 2)

    with eager_attention(model, change):
        expected = model(IMAGES)
    with edit(model, frozen=rows):
        assert_close(model(IMAGES), expected)


def test_frozen_layers_can_be_chosen_and_recordings_serve(plain):
    model = build(plain)
    with record(model) as maps:
        model(IMAGES.flip(-2))
    outputs = []
    for frozen in (maps, maps.passes[0]):
        with edit(model, [0, 1], frozen=frozen) as report:
            outputs.append(model(IMAGES))
        assert report.layers == (0, 1)
    assert_same_bits(*outputs)
    with edit(model, frozen=maps.cpu()):
        assert_close(model(IMAGES.flip(-2)), model(IMAGES.flip(-2)))


@pytest.mark.parametrize("kind", EDITS)
def test_gradients_are_those_of_the_edited_matrices(plain, kind):
    model = build(plain)
    arguments, change = EDITS[kind]
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients():
        loss = model(IMAGES).square().sum()
        return [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(
                parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
            )
        ]

    with eager_attention(model, change):
        expected = gradients()
    with edit(model, **arguments):
        ours = gradients()
    for a, b in zip(ours, expected, strict=True):
        assert_close(a, b, size=max(1.0, float(b.abs().max())))


@torch.no_grad()
def test_layers_that_are_not_edited_keep_their_bits(plain):
    model = build(plain)
    inputs, outputs = [], []
    handles = [
        block.attn.register_forward_hook(
            lambda _, args, output: inputs.append(args[0]) or outputs.append(output)
        )
        for block in model.blocks
    ]
    with edit(model, heads={1: [0]}):
        model(IMAGES)
    for handle in handles:
        handle.remove()
    for number in (0, 2):
        assert_same_bits(model.blocks[number].attn(inputs[number]), outputs[number])
    assert not same_bits(model.blocks[1].attn(inputs[1]), outputs[1])


def test_the_identity_keeps_bits_where_the_kernel_stays_and_is_close_where_it_does_not(plain):
    model = build(plain)
    plainly = model(IMAGES)
    for arguments in (
        {"heads": {}},
        {"heads": {1: []}},
        {"heads": []},
        {"keys": []},
        {"keys": "registers", "queries": "cls"},  # there are none
        {"keys": torch.zeros(N, dtype=torch.bool)},
        {"keys": [1], "queries": []},
    ):
        with edit(model, **arguments):
            assert_same_bits(model(IMAGES), plainly)
    with edit(model, weights=lambda _, weights: weights):
        assert_close(model(IMAGES), plainly)


MASKS = {
    "tokens of all images": ((N,), lambda mask: mask[None].expand(2, -1)),
    "tokens of each image": ((2, N), lambda mask: mask),
    "patches of each image": ((2, 2, 3), lambda mask: nn.functional.pad(mask.flatten(1), (1, 0))),
}


@pytest.mark.parametrize("kind", MASKS)
@given(seed=st.integers(0, 50))
def test_a_mask_hides_other_keys_of_each_image(kind, seed):
    shape, as_tokens = MASKS[kind]
    model = build(upstreams.FIRST)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask.view(-1)[0] = False
    tokens = as_tokens(mask)
    tokens = tokens & (tokens.sum(1, keepdim=True) < N)  # an image without any key is an error
    if tokens.all(1).any():
        return

    def change(_, weights):
        left = weights * ~tokens[:, None, None]
        return left / left.sum(-1, keepdim=True)

    with eager_attention(model, change):
        expected = model(IMAGES)
    with edit(model, keys=mask):
        output = model(IMAGES)
    assert_close(output, expected)
    with edit(model, keys=mask.numpy()):
        assert_same_bits(model(IMAGES), output)


@given(data=st.data())
def test_nested_edits_are_made_from_the_outside_in(data):
    model = build(upstreams.FIRST)
    kinds = data.draw(st.lists(st.sampled_from(sorted(EDITS)), min_size=2, max_size=4))

    def change(number, weights):
        for kind in kinds:
            weights = EDITS[kind][1](number, weights)
        # Rows of zeros have no sum to divide by.
        return weights.nan_to_num(0)

    def run(left):
        if not left:
            return model(IMAGES)
        arguments, _ = EDITS[left[0]]
        if "weights" in arguments:
            arguments = {
                **arguments,
                "weights": lambda _, weights: sharper(weights).nan_to_num(0),
            }
        with edit(model, **arguments):
            return run(left[1:])

    with eager_attention(model, change):
        expected = model(IMAGES)
    assert_close(run(kinds), expected)
    assert_nothing_on(model)


def test_kinds_of_attention_are_edited_by_their_paths():
    model, x = Aggregator(), noise(2, 3, 5, 8, seed=0).float()
    with edit(model, heads={"global_blocks.1": 0}), record(model) as maps:
        model(x)
    frames, everything = maps.passes
    assert not everything.weights[1][:, 0].any()
    assert everything.weights[1][:, 1].sum() > 0
    assert all(w.all() for w in (*frames.weights, everything.weights[0]))
    with edit(model, ["frame_blocks.0"], keys=[4]), record(model) as maps:
        model(x)
    assert not maps.passes[0].weights[0][..., 4].any()


def test_registers_and_other_sizes_are_found_by_their_names():
    model = randomise(
        upstreams.LIGHTLY.cls("DinoVisionTransformer")(
            img_size=4, patch_size=2, embed_dim=8, num_heads=2, depth=2, block_chunks=0,
            num_register_tokens=2,
        ).double(),
        1,
    )  # fmt: skip
    for size in ((4, 6), (8, 4)):
        images = noise(1, 3, *size, seed=0, dtype=torch.float64)
        with edit(model, keys="registers", queries="patches"), record(model) as maps:
            model(images)
        for weights in maps.weights:
            assert not weights[:, :, 3:, 1:3].any()
            assert weights[:, :, :3].all()
            assert weights[..., 3:].all()


def test_a_class_that_hands_on_to_its_base_is_edited_once(grafted):
    block = partial(grafted.cls("Block"), attn_class=grafted.cls("MemEffAttention"))
    model = build(grafted, block_fn=block)
    with eager_attention(model, lambda _, weights: sharper(weights)):
        expected = model(IMAGES)
    with edit(model, weights=lambda _, weights: sharper(weights)) as report:
        assert_close(model(IMAGES), expected)
    assert set(report.calls.values()) == {1}


def test_a_pass_that_ends_early_has_edited_what_it_ran(plain):
    model = build(plain)
    for _ in range(2):
        with edit(model, heads=-1) as report:
            maps = attention_maps(model, IMAGES, [0])
        assert not maps.weights[0][:, 1].any()
    assert set(report.calls) == {0}


@torch.no_grad()
def test_a_rollout_of_a_fused_model_sees_the_edited_weights():
    model = models_at_kernel.build(upstreams.FIRST)
    images = noise(2, 3, 8, 8, seed=0, dtype=torch.float64)
    for arguments in (
        {"heads": {-1: -1, 0: 0}},
        {"keys": [1, 2], "queries": "patches"},
        {"weights": lambda _, weights: sharper(weights), "queries": [0, 3]},
    ):
        with edit(model, **arguments):
            rolled = rollout(model, images, queries=[0, 2]).weights
            with record(model) as maps:
                model(images)
        product = torch.eye(maps.weights[0].shape[-1], dtype=torch.float64)
        for weights in maps.weights:
            layer = (torch.eye(product.shape[-1]) + weights.mean(1)) / 2
            product = layer / layer.sum(-1, keepdim=True) @ product
        assert_close(rolled, product[:, [0, 2]])


def test_an_attention_module_that_is_asked_answers_with_edited_weights(grafted):
    model, tokens = build(grafted), noise(1, 5, 8, seed=3, dtype=torch.float64)
    attention = model.blocks[1].attn
    plainly = attention(tokens, return_attn=True)
    with edit(attention, heads=0):
        weights = attention(tokens, return_attn=True)
        assert_close(weights, without_heads([0])(plainly))
        assert_close(attention(tokens, return_attn=True, queries=[2])[:, :, 0], weights[:, :, 2])


def test_a_probe_of_the_layout_is_not_edited(plain):
    model = build(plain)
    with edit(model, weights=lambda _, weights: sharper(weights)) as report:
        with record(model, [2]) as maps:
            model(IMAGES)
        assert maps.grid == (2, 3)
    assert set(report.calls.values()) == {1}
