"""Test-time registers: planted artifacts vanish, and passes are those that are written by hand."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

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
from dinov2_attn.errors import InvalidInputError, NotEditedError, OutOfRangeError
from dinov2_attn.grafting import interventions
from dinov2_attn.maps.geometry import geometry_of
from tests.support import dinov3, models_at_kernel, reference, upstreams
from tests.support.edits import nothing_left
from tests.support.planted_registers import attract, last_of, marked_images, plant
from tests.support.recordings import Around, build
from tests.support.strategies import ModelCase, noise, randomise
from tests.support.tolerances import assert_close, assert_same_bits, same_bits
from tests.support.xformers_visibility import quiet

COUNTED = tuple(u for u in upstreams.WITH_MODELS if u.name not in {"dinov2", "roma"})
GRID, PLACES = (6, 7), [(1, 5), (4, 0), (2, 3)]
LAYER, NEURONS = 2, [5, 11]


def dinov2(upstream, registers=0, **options):
    """Return a model of 6 blocks in float64, whose attention is sharp."""
    options = {"depth": 6, "block_chunks": 0, "mlp_ratio": 2, "init_values": 1.0, **options}
    model = upstream.cls("DinoVisionTransformer")(
        img_size=8, patch_size=2, embed_dim=32, num_heads=4,
        num_register_tokens=registers, **options,
    )  # fmt: skip
    return randomise(model.double(), 1)


def dinov3_of(copy_of, **options):
    options = {"depth": 6, "n_storage_tokens": 0, "mask_k_bias": False, **options}
    model = copy_of.load().build(**options).double()
    return randomise(model, 2)


KINDS = {
    **{f"{u}-{r}": partial(dinov2, u, r) for u in COUNTED for r in (0, 4)},
    "chunked": partial(dinov2, upstreams.LIGHTLY, 2, block_chunks=2),
    "swiglu": partial(dinov2, upstreams.LIGHTLY, 1, ffn_layer="swiglu"),
    **{
        f"dinov3-{c}-{r}-{ffn}": partial(dinov3_of, c, n_storage_tokens=r, ffn_layer=ffn)
        for c in dinov3.COPIES
        for r, ffn in ((0, "mlp"), (4, "swiglu"))
    },
}


@pytest.fixture(params=KINDS, ids=str)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def model():
    return dinov2(upstreams.LIGHTLY, 1)


@pytest.fixture
def images(model):
    return marked_images(model, GRID, PLACES)


def registers_of(model):
    name = "n_storage_tokens" if hasattr(model, "n_storage_tokens") else "num_register_tokens"
    return getattr(model, name)


def in_another_thread(run):
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def features_of(model, images):
    """Return CLS, registers and patches of the model's own ``forward_features``."""
    found = model.forward_features(images)
    registers = next(found[n] for n in ("x_norm_regtokens", "x_storage_tokens") if n in found)
    return found["x_norm_clstoken"], registers, found["x_norm_patchtokens"], found["x_prenorm"]


# By hand


def neurons_by_hand(mlp, tokens):
    if hasattr(mlp, "fc1"):
        return F.gelu(mlp.fc1(tokens))
    if hasattr(mlp, "w12"):
        first, second = mlp.w12(tokens).chunk(2, dim=-1)
    else:
        first, second = mlp.w1(tokens), mlp.w2(tokens)
    return F.silu(first) * second


def by_hand(model, images, neurons, count):
    """Return tokens before the final norm, and the input of each attention, one image at a time."""
    own = registers_of(model)
    outputs, inputs = [], []
    for image in images:
        given = model.prepare_tokens_with_masks(image[None])
        tokens, size = given if isinstance(given, tuple) else (given, None)
        zeros = torch.zeros(1, count, tokens.shape[2], dtype=tokens.dtype)
        tokens = torch.cat([tokens[:, : 1 + own], zeros, tokens[:, 1 + own :]], dim=1)
        patches, inputs_of_image = range(1 + own + count, tokens.shape[1]), []
        for layer, block in enumerate(flat_blocks(model.blocks)):
            normed = block.norm1(tokens)
            inputs_of_image.append(normed)
            rope = {} if size is None else {"rope": model.rope_embed(H=size[0], W=size[1])}
            tokens = tokens + block.ls1(block.attn(normed, **rope))
            hidden = neurons_by_hand(block.mlp, block.norm2(tokens))
            for neuron in neurons.get(layer, []):
                largest = max(hidden[0, :, neuron].tolist(), key=abs)
                for token in range(tokens.shape[1]):
                    if token in patches:
                        hidden[0, token, neuron] = 0
                    elif token > own:
                        hidden[0, token, neuron] = largest
            tokens = tokens + block.ls2(last_of(block.mlp)(hidden))
        outputs.append(tokens)
        inputs.append(inputs_of_image)
    return torch.cat(outputs), [torch.cat(layer) for layer in zip(*inputs, strict=True)]


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


# What stays


def test_nothing_is_changed_outside(kind):
    model, other = kind(), kind()
    images = marked_images(model, GRID, PLACES)
    expected, found = model(images), []
    state = {name: value.clone() for name, value in model.state_dict().items()}
    pickled, attributes = pickle.dumps(model), dict(vars(model))
    with nothing_left(model):
        with add_registers(model, {1: [0]}):
            changed = model(images)
            assert_same_bits(other(images), expected)
            in_another_thread(lambda: found.append((model(images), registers_of(model))))
            twin = copy.deepcopy(model)
            assert pickle.dumps(model) == pickled
            assert vars(model) == attributes
            assert_same_bits(dict(model.state_dict()), state)
            assert_same_bits(twin(images), expected)
            assert registers_of(twin) == registers_of(model) - 1
            assert_same_bits(pickle.loads(pickled)(images), expected)
        assert_same_bits(model(images), expected)
    assert not same_bits(changed, expected)
    assert_same_bits(found[0][0], expected)
    assert found[0][1] == registers_of(model)
    assert not interventions._OPEN
    assert not interventions._MODULES


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception(model, images, error):
    expected = model(images)

    def fail():
        model(images)
        raise error

    with nothing_left(model), pytest.raises(error), add_registers(model, {0: [1]}):
        fail()
    hook = model.blocks[3].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), add_registers(model, {0: [1]}):
        model(images)
    hook.remove()
    with nothing_left(model):
        assert_same_bits(model(images), expected)
    assert not interventions._OPEN


def test_each_thread_has_its_own(model, images):
    kinds = [({0: [1]}, 1), ({1: [1]}, 2), ({2: [3, 4]}, 1), ({0: [1]}, 3)]
    expected = []
    for neurons, count in kinds:
        with add_registers(model, neurons, count):
            expected.append(model(images))
    barrier, found = threading.Barrier(len(kinds)), {}

    def work(i):
        barrier.wait()
        for _ in range(10):
            with add_registers(model, *kinds[i]):
                found.setdefault(i, []).append(model(images))

    with nothing_left(model):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(kinds))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, outputs in found.items():
        assert len(outputs) == 10
        assert_same_bits(outputs, [expected[i]] * 10)


def test_blocks_of_two_models_are_nested(model, images):
    other = dinov2(upstreams.DEPTH_ANYTHING, 0)
    alone = []
    for one, neurons in ((model, {0: [1]}), (other, {2: [3]})):
        with add_registers(one, neurons):
            alone.append(one(images))
    outer, inner = add_registers(model, {0: [1]}), add_registers(other, {2: [3]})
    outer.__enter__()
    inner.__enter__()
    assert_same_bits([model(images), other(images)], alone)
    outer.__exit__(None, None, None)
    assert_same_bits(other(images), alone[1])
    assert registers_of(model) == 1
    inner.__exit__(None, None, None)
    assert not interventions._OPEN


def test_the_number_of_registers_can_be_set_inside(model, images):
    with add_registers(model, {0: [1]}):
        model(images)
        model.num_register_tokens = 1
        assert model.num_register_tokens == 2
    assert vars(model)["num_register_tokens"] == model.num_register_tokens == 1


def test_install_and_uninstall_inside(model, images):
    with nothing_left(model), add_registers(model, {0: [1]}):
        expected = model(images)
        with dinov2_attn.install(upstreams.LIGHTLY.package):
            assert_same_bits(model(images), expected)
            assert model.get_last_self_attention(images).shape[-1] == 3 + GRID[0] * GRID[1]
        dinov2_attn.uninstall()
        assert_same_bits(model(images), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpoints_are_run_again_as_they_were(model, images, reentrant):
    def gradients():
        model.zero_grad()
        model(images).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.blocks.parameters()]

    images.requires_grad_()
    with add_registers(model, {0: [1], 4: [2]}):
        expected = gradients()
        for block in model.blocks:
            run = type(block).forward
            block.forward = partial(
                torch.utils.checkpoint.checkpoint, partial(run, block), use_reentrant=reentrant
            )
        found = gradients()
        for block in model.blocks:
            del block.forward
    assert_same_bits(found, expected)


def test_tasks_of_asyncio_have_their_own(model, images):
    expected = model(images)
    with add_registers(model, {0: [1]}):
        changed = model(images)
    found = {}

    async def inside(left):
        with add_registers(model, {0: [1]}):
            later = asyncio.create_task(outlives(left))
            await asyncio.sleep(0)
            found["inside"] = model(images)
            found["thread"] = await asyncio.to_thread(model, images)
        left.set()
        await later

    async def outlives(left):
        found["task of it"] = model(images)
        await left.wait()
        found["outlives"] = model(images)

    async def outside(left):
        await asyncio.sleep(0)
        found["outside"] = model(images)
        await left.wait()

    async def both():
        left = asyncio.Event()
        await asyncio.gather(inside(left), outside(left))

    asyncio.run(both())
    assert_same_bits([found["inside"], found["task of it"]], [changed] * 2)
    assert_same_bits([found[name] for name in ("thread", "outside", "outlives")], [expected] * 3)


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


# What cannot be changed


def test_the_first_revision_is_refused():
    model = build(upstreams.FIRST)
    with (
        nothing_left(model),
        pytest.raises(InvalidInputError, match="num_register_tokens"),
        add_registers(model, {0: [1]}),
    ):
        pass


@pytest.mark.parametrize(
    ("neurons", "count", "error", "match"),
    [
        ({}, 1, InvalidInputError, "none"),
        ({3: []}, 1, InvalidInputError, "none"),
        ([3], 1, InvalidInputError, "list"),
        ({6: [0]}, 1, OutOfRangeError, "6"),
        ({0: [64]}, 1, OutOfRangeError, "64"),
        ({0: [-65, 3]}, 1, OutOfRangeError, "-65"),
        ({0: [1.5]}, 1, InvalidInputError, "1.5"),
        ({0: [True]}, 1, InvalidInputError, "True"),
        ({"a": [1]}, 1, InvalidInputError, "'a'"),
        ({0: [1]}, 0, InvalidInputError, "0"),
        ({0: [1]}, 1.0, InvalidInputError, "1.0"),
    ],
)
def test_wrong_arguments(model, neurons, count, error, match):
    with (
        nothing_left(model),
        pytest.raises(error, match=match),
        add_registers(model, neurons, count),
    ):
        pass


def test_neurons_may_be_one_a_tensor_or_counted_from_the_end(model, images):
    with add_registers(model, {-1: [1, 63], 2: [0]}):
        expected = model(images)
    for neurons in ({5: torch.tensor([1, -1]), 2: 0}, {5: (63, 1, 1), -4: [-64]}):
        with add_registers(model, neurons):
            assert_same_bits(model(images), expected)


def test_a_block_inside_another_is_refused(model, images):
    with add_registers(model, {0: [1]}):
        expected = model(images)
        with (
            pytest.raises(InvalidInputError, match="another block"),
            add_registers(model, {1: [1]}),
        ):
            pass
        assert_same_bits(model(images), expected)


def test_a_block_without_a_pass_is_an_error(model, images):
    with pytest.raises(NotEditedError, match="no pass"), add_registers(model, {0: [1]}):
        pass
    with pytest.raises(NotEditedError, match="no pass"), add_registers(model, {0: [1]}):
        in_another_thread(lambda: model(images))


def test_no_artifacts_is_an_error(model):
    images = noise(2, 3, 8, 8, seed=3, dtype=torch.float64) * 0.1
    assert not artifact_tokens(model, images).mask.any()
    with nothing_left(model), pytest.raises(InvalidInputError, match="none in 2 images"):
        find_register_neurons(model, images)


def test_wrong_questions_for_neurons(model, images):
    plant(model, LAYER, NEURONS, images, PLACES)
    found = artifact_tokens(model, images)
    for arguments, match in (
        ({"top": 0}, "top"),
        ({"top": 10**6}, "top"),
        ({"top": "all"}, "top"),
        ({"artifacts": artifact_tokens(model, images[:1])}, "these images"),
        ({"artifacts": [found, found]}, "these images"),
        ({"layers": [9]}, "blocks"),
    ):
        with nothing_left(model), pytest.raises(InvalidInputError, match=match):
            find_register_neurons(model, images, **arguments)


class Adapted(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) + x.mean()


def adapt(block):
    block.mlp.fc2 = Adapted(64, 32).double()


def parametrize(block):
    torch.nn.utils.parametrizations.spectral_norm(block.mlp.fc2)


def replace(block):
    block.mlp.forward = lambda x: x


def replace_last(block):
    block.mlp.fc2.forward = lambda x: x[..., :32]


def add_another(block):
    block.adapter = copy.deepcopy(block.mlp)


def remove(block):
    block.mlp = torch.nn.Identity()


@pytest.mark.parametrize(
    "change",
    [adapt, parametrize, replace, replace_last, add_another, remove],
    ids=lambda c: c.__name__,
)
def test_an_mlp_that_is_no_plain_one_is_refused(model, change):
    change(model.blocks[2])
    with pytest.raises(InvalidInputError, match="none in block 2"), add_registers(model, {0: [1]}):
        pass


def test_an_mlp_in_two_blocks_is_refused(model):
    model.blocks[2].mlp = model.blocks[1].mlp
    with pytest.raises(InvalidInputError, match="several"), add_registers(model, {0: [1]}):
        pass


def test_neurons_that_a_kernel_hides_are_an_error(model, images):
    class Fused(type(model.blocks[1].mlp)):
        def forward(self, x):
            return self.act(self.fc1(x)) @ self.fc2.weight.T + self.fc2.bias

    model.blocks[1].mlp.__class__ = Fused
    with nothing_left(model):
        with add_registers(model, {0: [1]}):
            model(images)
        with pytest.raises(NotEditedError, match="0 that"), add_registers(model, {1: [1]}):
            model(images)


def test_tokens_of_another_kind_are_an_error(model, images):
    class Longer(type(model)):
        def prepare_tokens_with_masks(self, x, masks=None):
            tokens = super().prepare_tokens_with_masks(x, masks)
            return torch.cat([tokens, tokens[:, :1]], 1)

    model.__class__ = Longer
    with (
        nothing_left(model),
        pytest.raises(NotEditedError, match=r"2 \+ 6 · 7"),
        add_registers(model, {0: [1]}),
    ):
        model(images)


@torch.no_grad()
def test_what_the_activation_returned_stays(model, images):
    seen = []
    model.blocks[1].mlp.act.register_forward_hook(lambda _, __, output: seen.append(output))
    model(images)
    with add_registers(model, {1: [3]}):
        model(images)
    assert seen[1][:, 3:, 3].all()


def test_a_model_without_the_number_has_none_inside(model, images):
    other = dinov2(upstreams.LIGHTLY, 1)
    del other.num_register_tokens
    with add_registers(model, {0: [1]}):
        model(images)
        assert not hasattr(other, "num_register_tokens")
        del model.num_register_tokens
        model.num_register_tokens = 1


def test_a_model_whose_layout_was_measured_before():
    with dinov2_attn.install(upstreams.LIGHTLY.package):
        model = models_at_kernel.build(upstreams.LIGHTLY, registers=2)
        with dinov2_attn.install(model):
            images = marked_images(model, GRID, PLACES)
            outside = model.get_self_attention(images, queries="registers")
            with add_registers(model, {0: [1]}):
                inside = model.get_self_attention(images, queries="registers")
                full = model.get_self_attention(images)
            again = model.get_self_attention(images, queries="registers")
    assert outside[0].shape[2] == again[0].shape[2] == 2
    assert_close(list(inside), [weights[:, :, 1:4] for weights in full])


@quiet
def test_nested_lists_of_xformers_are_refused(nested):
    if nested not in COUNTED:
        pytest.skip("no registers")
    block = partial(nested.cls("NestedTensorBlock"), attn_class=nested.cls("MemEffAttention"))
    model = dinov2(nested, 1, block_fn=block)
    images = marked_images(model, GRID, PLACES)

    def run(batches):
        tokens = [model.prepare_tokens_with_masks(batch) for batch in batches]
        for block in model.blocks:
            tokens = block(tokens)
        return tokens

    with (
        nothing_left(model),
        pytest.raises(NotEditedError, match="one batch at a time"),
        add_registers(model, {0: [1]}),
    ):
        run([images, images[..., :8]])
    with add_registers(model, {0: [1]}):
        (alone,) = run([images[:1]])
        expected = model.forward_features(images[:1])["x_prenorm"]
        # As many tokens in one image as in the list of two that follows.
        run([marked_images(model, (3, 29), [(0, 0)])])
        with pytest.raises(NotEditedError, match="one batch at a time"):
            run([images[:1], images[1:2]])
    assert_close(alone, expected)


def test_lists_of_dinov3_are_changed_and_dropped_samples_refused():
    model = dinov3_of(dinov3.LIGHTLY, n_storage_tokens=2, drop_path_rate=0.5)
    images = [marked_images(model, GRID, PLACES), marked_images(model, (3, 4), [(0, 1)])]
    with add_registers(model, {0: [1], 3: [2]}):
        together = model.forward_features(images, [None, None])
        alone = [model.forward_features(batch) for batch in images]
    for a, b in zip(together, alone, strict=True):
        assert_close(a["x_prenorm"], b["x_prenorm"])
    model.train()
    with pytest.raises(NotEditedError, match="eval"), add_registers(model, {0: [1]}):
        model.forward_features(images, [None, None])


def test_a_graph_is_refused(model, images):
    with (
        nothing_left(model),
        pytest.raises(NotEditedError, match="_orig_mod"),
        add_registers(model, {0: [1]}),
    ):
        torch.export.export(model, (images,))
