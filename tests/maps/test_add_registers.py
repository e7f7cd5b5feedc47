"""Test-time registers: planted artifacts vanish, and passes are those that are written by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dinov2_attn
from dinov2_attn import (
    RegisterNeurons,
    add_registers,
    artifact_tokens,
    attention_maps,
    edit,
    find_register_neurons,
    record,
    rollout,
)
from dinov2_attn.backbone.backbone import flat_blocks
from dinov2_attn.maps.geometry import geometry_of
from tests.support import reference, upstreams
from tests.support.edits import nothing_left
from tests.support.planted_registers import attract, marked_images, plant
from tests.support.recordings import Around
from tests.support.registers import (
    COUNTED,
    GRID,
    KINDS,
    LAYER,
    NEURONS,
    PLACES,
    by_hand,
    dinov2,
    features_of,
    registers_of,
)
from tests.support.strategies import ModelCase, noise
from tests.support.tolerances import assert_close, assert_same_bits, same_bits


@pytest.fixture(params=KINDS, ids=str)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def model():
    return dinov2(upstreams.LIGHTLY, 1)


@pytest.fixture
def images(model):
    return marked_images(model, GRID, PLACES)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3])
def test_a_pass_is_that_which_is_written_by_hand(kind, count):
    model = kind()
    images = marked_images(model, GRID, PLACES)
    neurons = {1: [0, 7, 3], 4: [2]}
    expected, _ = by_hand(model, images, neurons, count)
    own = registers_of(model)
    with nothing_left(model), add_registers(model, neurons, count):
        cls, registers, patches, before = features_of(model, images)
        layers = model.get_intermediate_layers(images, n=2, return_class_token=True)
        grids = model.get_intermediate_layers(images, n=1, reshape=True)
        assert registers_of(model) == own + count
    assert registers_of(model) == own
    assert_close(before, expected)
    normed = model.norm(expected)
    assert_close(cls, normed[:, 0])
    assert_close(registers, normed[:, 1 : 1 + own + count])
    assert_close(patches, normed[:, 1 + own + count :])
    assert_close(layers[-1][0], normed[:, 1 + own + count :])
    assert_close(layers[-1][1], normed[:, 0])
    assert_close(grids[0].flatten(2).mT, normed[:, 1 + own + count :])


numbers = st.lists(st.integers(0, 15), max_size=4, unique=True)


@given(
    chosen=st.dictionaries(st.integers(0, 2), numbers, min_size=1).filter(
        lambda chosen: any(chosen.values())
    ),
    count=st.integers(1, 3),
    registers=st.integers(0, 3),
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    chunks=st.sampled_from([0, 1, 3]),
    which=st.sampled_from(COUNTED),
    seed=st.integers(0, 99),
)
def test_any_neurons_of_any_model(chosen, count, registers, batch, grid, chunks, which, seed):
    case = ModelCase(3, chunks, registers, 2, grid, batch, torch.float64, seed)
    model = case.build(which)
    with torch.no_grad():
        expected, inputs = by_hand(model, case.images, chosen, count)
        plain = model.forward_features(case.images)["x_prenorm"]
        with add_registers(model, chosen, count), record(model) as maps:
            found = model.forward_features(case.images)["x_prenorm"]
        assert_same_bits(model.forward_features(case.images)["x_prenorm"], plain)
    assert_close(found, expected)
    assert maps.prefix == 1 + registers + count
    for block, given_, weights in zip(flat_blocks(model.blocks), inputs, maps.weights, strict=True):
        assert_close(weights, reference.weights(block.attn, given_))


# Planted


@torch.no_grad()
@pytest.mark.filterwarnings("error::dinov2_attn.errors.SuspiciousArtifactsWarning")
def test_planted_artifacts_are_found_and_vanish(kind):
    model = kind()
    images = marked_images(model, GRID, PLACES)
    plant(model, LAYER, NEURONS, images, PLACES)
    before = artifact_tokens(model, images)
    assert [list(map(tuple, mask.nonzero().tolist())) for mask in before.mask] == [
        [place] for place in PLACES
    ]
    neurons = find_register_neurons(model, images, 2)
    assert set(zip(neurons.layers.tolist(), neurons.neurons.tolist(), strict=True)) == {
        (LAYER, neuron) for neuron in NEURONS
    }
    artifacts = features_of(model, images)[2]
    with add_registers(model, neurons):
        after = artifact_tokens(model, images)
        every = [artifact_tokens(model, images, layer) for layer in range(6)]
        _, registers, patches, tokens = features_of(model, images)
    assert not after.mask.any()
    assert not any(one.mask.any() for one in every)
    norms = tokens.norm(dim=-1)
    new, first = norms[:, registers.shape[1]], 1 + registers.shape[1]
    assert (new > 10 * norms[:, first:].amax(1)).all(), "the register has the norm of the artifact"
    others = ~before.mask.flatten(1)
    moved = (patches - artifacts).norm(dim=-1) / artifacts.norm(dim=-1)
    assert moved[others].max() < 0.05 < moved[~others].min(), "other patches hardly change"


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 4])
def test_attention_to_artifacts_goes_to_the_register(registers):
    model = dinov2(upstreams.LIGHTLY, registers)
    images = marked_images(model, GRID, PLACES)
    plant(model, LAYER, NEURONS, images, PLACES)
    attract(model, images, PLACES)
    before = artifact_tokens(model, images)
    assert (before.share > 0.4).all()
    assert before.cls_sinks[before.mask].all()
    with add_registers(model, find_register_neurons(model, images, 2)):
        after = artifact_tokens(model, images)
        maps = attention_maps(model, images, 1, queries="cls", heads="mean")
    new = maps.weights[0][:, 0, 1 + registers]
    assert_close(new, before.share, within=0.1)
    assert not after.mask.any()
    assert (after.from_cls[before.mask] < before.share / 8).all()


@torch.no_grad()
def test_scores_are_those_of_hooks(model, images):
    plant(model, LAYER, NEURONS, images, PLACES)
    hidden = []
    hooks = [
        block.mlp.fc2.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        for block in model.blocks
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    found = artifact_tokens(model, images)
    means = torch.stack(
        [
            torch.stack(
                [
                    neurons[i, 2 + row * GRID[1] + column].abs()
                    for i, (row, column) in enumerate(PLACES)
                ]
            ).mean(0)
            for neurons in hidden
        ]
    )
    assert all(found.layer >= LAYER)
    searched = means[: int(found.layer.max()) + 1]
    every = find_register_neurons(model, images, searched.numel())
    assert_close(every.scores, searched[every.layers, every.neurons])
    assert_close(every.scores, every.scores.sort(descending=True).values)
    assert len({*zip(every.layers.tolist(), every.neurons.tolist(), strict=True)}) == len(every)
    some = find_register_neurons(model, images, 3, layers=[0, -1], artifacts=found)
    assert {*some.layers.tolist()} <= {0, 5}
    assert_close(some.scores, torch.cat([means[0], means[5]]).topk(3).values)
    batches = find_register_neurons(model, [images[:1], images[1:]], 5)
    assert_close(batches.scores, find_register_neurons(model, images, 5).scores)


@torch.no_grad()
def test_images_without_artifacts_do_not_count(model, images):
    plant(model, LAYER, NEURONS, images, PLACES)
    plain = images.clone()
    plain[1:] = noise(2, *images.shape[1:], seed=9, dtype=torch.float64) * 0.3
    assert artifact_tokens(model, plain).mask.flatten(1).any(1).tolist() == [True, False, False]
    alone = find_register_neurons(model, images[:1], 4)
    assert_close(find_register_neurons(model, plain, 4).scores, alone.scores)
    for batches in ([plain[1:], plain[:1]], [plain[:1], plain[1:]]):
        assert_close(find_register_neurons(model, batches, 4).scores, alone.scores)


def test_a_result_is_saved_and_read(tmp_path):
    pytest.importorskip("safetensors")
    neurons = RegisterNeurons(torch.tensor([3, 2, 3]), torch.tensor([1, 7, 0]), torch.rand(3))
    neurons.save(tmp_path / "neurons.safetensors")
    again = RegisterNeurons.load(tmp_path / "neurons.safetensors")
    assert_same_bits(again.scores, neurons.scores)
    assert again.by_layer() == {2: [7], 3: [1, 0]}
    assert repr(neurons) == "RegisterNeurons(neurons=3, layers=2–3)"
    assert len(neurons) == 3


# With the rest of the package


@torch.no_grad()
def test_all_questions_see_the_register(kind):
    model = kind()
    images = marked_images(model, GRID, PLACES)
    own = registers_of(model)
    chosen = {1: [0, 7, 3], 4: [2]}
    outside = attention_maps(model, images)
    _, inputs = by_hand(model, images, chosen, 1)
    with nothing_left(model), add_registers(model, chosen):
        maps = attention_maps(model, images)
        rows = attention_maps(model, images, layers=1, queries="registers")
        rolled = rollout(model, images)
        with record(model, queries="patches") as recorded:
            model(images)
        with edit(model, keys="registers"), record(model) as hidden:
            model(images)
        with edit(model, heads=[0]), record(model) as ablated:
            model(images)
    assert maps.prefix == rolled.prefix == recorded.prefix == outside.prefix + 1 == 2 + own
    assert maps.grid == rolled.grid == outside.grid == GRID
    assert rows.queries == tuple(range(1, own + 2))
    for layer, block in enumerate(flat_blocks(model.blocks)):
        if not hasattr(model, "rope_embed"):
            assert_close(maps.weights[layer], reference.weights(block.attn, inputs[layer]))
        assert_close(recorded.weights[layer], maps.weights[layer][:, :, 2 + own :])
        assert not hidden.weights[layer][..., 1 : 2 + own].any()
        assert hidden.weights[layer][..., 2 + own :].any()
        assert not ablated.weights[layer][:, 0].any()
    assert_close(rows.weights[0], maps.weights[-1][:, :, 1 : 2 + own])
    again = attention_maps(model, images)
    assert again.prefix == outside.prefix
    assert_close(list(again.weights), list(outside.weights))


def placed(maps):
    return maps.prefix, maps.grid, maps.weights[0].shape[-1]


@torch.no_grad()
def test_a_recording_may_outlive_the_registers(kind):
    model = kind()
    images = marked_images(model, GRID, PLACES)
    own, patches = registers_of(model) + 1, GRID[0] * GRID[1]
    within, without = (own + 2, GRID, own + 2 + patches), (own, GRID, own + patches)
    with record(model) as outer, add_registers(model, {1: [0]}, 2):
        model(images)
    assert placed(outer) == within
    with add_registers(model, {1: [0]}, 2), record(model, queries="registers") as inner:
        model(images)
    assert placed(inner) == within
    assert inner.queries == tuple(range(1, own + 2))
    with record(model) as both:
        model(images)
        with add_registers(model, {1: [0]}, 2):
            model(images)
        model(images)
    assert [placed(maps) for maps in both.passes] == [without, within, without]
    with add_registers(model, {1: [0]}, 2):
        recording = record(model)
        maps = recording.__enter__()
        model(images)
    model(images)
    recording.__exit__(None, None, None)
    assert [placed(one) for one in maps.passes] == [within, without]
    if hasattr(model, "rope_embed"):
        return
    with record(model) as walked:  # tokens without images
        tokens = model.prepare_tokens_with_masks(images)
        with add_registers(model, {1: [0]}, 2):
            longer = model.prepare_tokens_with_masks(images)
            for block in flat_blocks(model.blocks):
                longer = block(longer)
        for block in flat_blocks(model.blocks):
            tokens = block(tokens)
    assert [one.prefix for one in walked.passes] == [own + 2, own]


@pytest.mark.parametrize("upstream", COUNTED, ids=str)
def test_grafted_models_answer(upstream):
    with dinov2_attn.install(upstream.package):
        model = dinov2(upstream, 2)
        images = marked_images(model, GRID, PLACES)
        plain = model.get_self_attention(images)
        with add_registers(model, {1: [0], 3: [4, 2]}):
            asked = model.get_self_attention(images)
            last = model.get_last_self_attention(images, queries="registers", heads="mean")
            output, attentions = model(images, return_attention=True)
            maps = attention_maps(model, images)
            assert_same_bits(output, model(images))
        _, inputs = by_hand(model, images, {1: [0], 3: [4, 2]}, 1)
        for block, given_, *found in zip(
            model.blocks, inputs, asked, attentions, maps.weights, strict=True
        ):
            expected = reference.weights(block.attn, given_)
            for weights in found:
                assert_close(weights, expected)
        assert_close(last, asked[-1][:, :, 1:4].mean(1))
        assert_same_bits(model.get_self_attention(images), plain)


def test_gradients_flow(model, images):
    images = images[:1]
    chosen = {1: [0, 7], 4: [2]}
    for parameter in model.parameters():
        parameter.requires_grad_()
    with add_registers(model, chosen):
        found = torch.autograd.grad(
            model.forward_features(images)["x_prenorm"].square().sum(),
            model.blocks[0].mlp.fc1.weight,
        )[0]
    weight, direction = model.blocks[0].mlp.fc1.weight, noise(64, 32, seed=4, dtype=torch.float64)
    values = []
    with torch.no_grad():
        for step in (1e-6, -1e-6):
            weight += step * direction
            values.append(by_hand(model, images, chosen, 1)[0].square().sum())
            weight -= step * direction
    slope = (values[0] - values[1]) / 2e-6
    assert_close((found * direction).sum(), slope, within=1e-5 * slope.abs().item())


def test_a_model_that_contains_one_is_changed(model, images):
    with add_registers(model, {0: [1]}):
        expected = model(images)
        maps = attention_maps(model, images)
    around = Around(model)
    with add_registers(around, {0: [1]}):
        assert_same_bits(around(images), expected)
        found = attention_maps(around, images)
    assert_close(list(found.weights), list(maps.weights))
    assert (found.prefix, found.grid) == (maps.prefix, maps.grid) == (3, GRID)


@torch.no_grad()
def test_masks_of_patches_and_other_sizes(model, images):
    masks = noise(3, GRID[0] * GRID[1], seed=8) > 0.5
    with add_registers(model, {2: [1, 4]}):
        found = model.forward_features(images, masks)["x_prenorm"]
        small = attention_maps(model, images[..., :8])
        again = attention_maps(model, images)
    wide = model.prepare_tokens_with_masks
    model.prepare_tokens_with_masks = lambda image: torch.cat(
        [wide(images, masks)[i] for i in range(3) if same_bits(image[0], images[i])]
    )[None]
    expected, _ = by_hand(model, images, {2: [1, 4]}, 1)
    del model.prepare_tokens_with_masks
    assert_close(found, expected)
    assert (small.grid, small.prefix) == ((6, 4), 3)
    assert (again.grid, again.prefix) == (GRID, 3)


def test_the_geometry_counts_them_inside_only(model, images):
    assert geometry_of(model).prefix == 2
    with add_registers(model, {2: [1]}, 2):
        model(images)
        assert geometry_of(model).prefix == 4
        assert geometry_of(dinov2(upstreams.LIGHTLY, 1)).prefix == 2
    assert geometry_of(model).prefix == 2


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    model = dinov2(upstreams.LIGHTLY, 1)
    images = marked_images(model, GRID, PLACES)
    expected, _ = by_hand(model, images, {1: [0, 7], 4: [2]}, 2)
    half = copy.deepcopy(model).float()
    with (
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        add_registers(half, {1: [0, 7], 4: [2]}, 2),
        record(half, [5]) as maps,
    ):
        found = half.forward_features(images.float())["x_prenorm"]
    assert_close(found, expected, dtype=dtype)
    assert maps.prefix == 4


def test_transforms_of_functions_are_changed_too(model, images):
    images = images[:1]

    def loss(given):
        return model.forward_features(given)["x_prenorm"].square().sum()

    given = images.clone().requires_grad_()
    with add_registers(model, {1: [0, 7]}):
        (expected,) = torch.autograd.grad(loss(given), given)
        found = torch.func.grad(loss)(images)
    assert_close(found, expected)


@torch.no_grad()
def test_neurons_are_found_with_registers_that_are_there(model, images):
    plant(model, LAYER, [5], images, PLACES)
    plant(model, LAYER, [9], images, PLACES)
    with add_registers(model, {LAYER: [5]}):
        assert artifact_tokens(model, images).mask.any()
        neurons = find_register_neurons(model, images, 1)
    assert neurons.by_layer() == {LAYER: [9]}
