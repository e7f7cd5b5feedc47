"""`add_registers` among threads, tasks, exceptions, checkpoints and mistakes."""

from __future__ import annotations

import _thread
import asyncio
import copy
import pickle
import threading
from functools import partial

import pytest
import torch

import dinov2_attn
from dinov2_attn import (
    add_registers,
    artifact_tokens,
    find_register_neurons,
)
from dinov2_attn.errors import InvalidInputError, NotEditedError, OutOfRangeError
from dinov2_attn.grafting import interventions
from tests.support import dinov3, models_at_kernel, upstreams
from tests.support.edits import nothing_left
from tests.support.planted_registers import marked_images, plant
from tests.support.recordings import build
from tests.support.registers import (
    COUNTED,
    GRID,
    KINDS,
    LAYER,
    NEURONS,
    PLACES,
    by_hand,
    dinov2,
    dinov3_of,
    registers_of,
)
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, assert_same_bits, same_bits
from tests.support.xformers_visibility import quiet


@pytest.fixture(params=KINDS, ids=str)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def model():
    return dinov2(upstreams.LIGHTLY, 1)


@pytest.fixture
def images(model):
    return marked_images(model, GRID, PLACES)


def in_another_thread(run):
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def in_a_foreign_thread(run):
    """Run in a thread that Python did not start, as those of autograd on a GPU."""
    done = threading.Event()
    _thread.start_new_thread(lambda: (run(), done.set()), ())
    assert done.wait(60)


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
            in_a_foreign_thread(lambda: found.append((model(images), registers_of(model))))
            twin = copy.deepcopy(model)
            assert pickle.dumps(model) == pickled
            assert vars(model) == attributes
            assert_same_bits(dict(model.state_dict()), state)
            assert_same_bits(twin(images), expected)
            assert registers_of(twin) == registers_of(model) - 1
            assert_same_bits(pickle.loads(pickled)(images), expected)
        assert_same_bits(model(images), expected)
    assert not same_bits(changed, expected)
    assert_same_bits([output for output, _ in found], [expected] * 2)
    assert [count for _, count in found] == [registers_of(model)] * 2
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


@pytest.mark.parametrize("upstream", [upstreams.DEPTH_ANYTHING, upstreams.LIGHTLY], ids=str)
def test_blocks_of_two_models_are_nested(model, images, upstream):
    """Of different classes, and of the same."""
    other = dinov2(upstream, 0)
    alone = []
    for one, neurons in ((model, {0: [1]}), (other, {2: [3]})):
        with add_registers(one, neurons):
            alone.append(one(images))
    classes = [dict(vars(type(one))) for one in (model, other)]
    outer, inner = add_registers(model, {0: [1]}), add_registers(other, {2: [3]})
    outer.__enter__()
    inner.__enter__()
    assert_same_bits([model(images), other(images)], alone)
    outer.__exit__(None, None, None)
    assert_same_bits(other(images), alone[1])
    assert (registers_of(model), registers_of(other)) == (1, 1)
    inner.__exit__(None, None, None)
    assert [dict(vars(type(one))) for one in (model, other)] == classes
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


def test_a_thread_of_autograds_runs_with_them_again(model, images):
    """As on a GPU, whose backward pass is in a thread that Python did not start."""
    images.requires_grad_()
    with add_registers(model, {0: [1], 4: [2]}):
        (expected,) = torch.autograd.grad(model(images).square().sum(), images)
        x = model.prepare_tokens_with_masks(images)
        for block in model.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)
        in_a_foreign_thread(model.head(model.norm(x)[:, 0]).square().sum().backward)
    assert_close(images.grad, expected)


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


def test_lists_of_batches_have_them_one_after_the_other():
    """Tokens of all batches are made before the first block runs."""
    with dinov2_attn.install(upstreams.LIGHTLY.package):
        model = dinov2(upstreams.LIGHTLY, 1)
        several = [noise(1, 3, *size, seed=0, dtype=torch.float64) for size in ((8, 8), (4, 12))]
        with add_registers(model, {0: [1]}):
            alone = [model.get_self_attention(images) for images in several]
            for given in (several, several[::-1], several):
                found = model.get_self_attention(given)
                for layer, weights in enumerate(found):
                    for images, ours in zip(given, weights, strict=True):
                        expected = alone[0 if images is several[0] else 1]
                        assert_close(ours, expected[layer])


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
    "attribute", [{"num_register_tokens": 1.0}, {"prepare_tokens_with_masks": lambda x, masks: x}]
)
def test_a_model_with_its_own_way_to_its_tokens_is_refused(model, attribute):
    vars(model).update(attribute)
    with pytest.raises(InvalidInputError, match="counts its reg"), add_registers(model, {0: [1]}):
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
        ({"artifacts": found.numpy()}, "found ArtifactTokens"),
        ({"artifacts": 3}, "found int"),
        ({"artifacts": []}, "found none"),
        ({"layers": [9]}, "blocks"),
    ):
        with nothing_left(model), pytest.raises(InvalidInputError, match=f"(?i){match}"):
            find_register_neurons(model, images, **arguments)
    for wrong in (None, [], images[0], images.numpy(), images[..., :7], images.long()):
        for artifacts in (None, found):
            with pytest.raises(InvalidInputError):
                find_register_neurons(model, wrong, artifacts=artifacts)
    two = torch.nn.ModuleList([model, copy.deepcopy(model)])
    for wrong in ("dinov2_vits14", None, torch.nn.Linear(3, 3), two):
        with pytest.raises(InvalidInputError, match="one DINOv2"):
            find_register_neurons(wrong, images)
        with pytest.raises(InvalidInputError, match="one DINOv2"), add_registers(wrong, {0: 1}):
            pass


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


def test_a_last_layer_may_be_given_its_weight_and_bias_by_name(model, images):
    class Named(type(model.blocks[1].mlp)):
        def forward(self, x):
            x = self.act(self.fc1(x))
            return torch.nn.functional.linear(x, weight=self.fc2.weight, bias=self.fc2.bias)

    with add_registers(model, {1: [1]}):
        expected = model(images)
    model.blocks[1].mlp.__class__ = Named
    with add_registers(model, {1: [1]}):
        assert_same_bits(model(images), expected)


def test_a_last_layer_that_is_used_twice_is_an_error(model, images):
    """Which of its inputs are the neurons cannot be told."""

    class Twice(type(model.blocks[1].mlp)):
        def forward(self, x):
            neurons = self.act(self.fc1(x))
            return self.fc2(neurons) + self.fc2(neurons * 2)

    model.blocks[1].mlp.__class__ = Twice
    with pytest.raises(NotEditedError, match="2 that"), add_registers(model, {1: [1]}):
        model(images)


def test_tokens_of_another_kind_are_an_error(model, images):
    class Longer(type(model)):
        def prepare_tokens_with_masks(self, x, masks=None):
            tokens = super().prepare_tokens_with_masks(x, masks)
            return torch.cat([tokens, tokens[:, :1]], 1)

    plant(model, LAYER, NEURONS, images, PLACES)
    found = artifact_tokens(model, images)
    model.__class__ = Longer
    with (
        nothing_left(model),
        pytest.raises(NotEditedError, match=r"(?s)2 \+ 6 · 7.*Found \(\d+, 45, 32\) in"),
        add_registers(model, {0: [1]}),
    ):
        model(images)
    with nothing_left(model), pytest.raises(NotEditedError, match="3, 45, 64"):
        find_register_neurons(model, images, artifacts=found)


def test_tokens_from_outside_are_an_error(model, images):
    tokens = model.prepare_tokens_with_masks(images)
    with pytest.raises(NotEditedError, match="inside the block"), add_registers(model, {0: [1]}):
        model.blocks[0](tokens)


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
        other.num_register_tokens = None  # as code that knows no registers may say
        assert other.num_register_tokens is None
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


@quiet
@torch.no_grad()
def test_the_swiglu_of_xformers_is_changed_where_it_is_eager(nested):
    if nested.name not in {one.name for one in COUNTED}:
        pytest.skip("no registers")
    model = dinov2(nested, 1, ffn_layer="swiglu")
    assert type(model.blocks[0].mlp).__mro__[1].__module__.startswith("xformers")
    images = marked_images(model, GRID, PLACES)
    expected, _ = by_hand(model, images, {0: [1], 3: [2]}, 1)
    with add_registers(model, {0: [1], 3: [2]}):
        assert_close(model.forward_features(images)["x_prenorm"], expected)
