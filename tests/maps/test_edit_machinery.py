"""`edit` among threads, exceptions, graphs, checkpoints, lists and mistakes."""

from __future__ import annotations

import _thread
import array
import copy
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dinov2_attn
from dinov2_attn import artifact_tokens, attention_maps, edit, record
from dinov2_attn.errors import (
    InvalidInputError,
    NotEditedError,
    NotRecordedError,
    OutOfRangeError,
    UnfaithfulError,
)
from dinov2_attn.grafting.channel import ACTIVE
from tests.maps.test_record_any_model import Aggregator, Attention, ByHand, FromOutside
from tests.support import upstreams
from tests.support.edits import nothing_left
from tests.support.recordings import IMAGES, N, assert_all_close, build
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, assert_same_bits, same_bits


def in_another_thread(run):
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def in_a_foreign_thread(run):
    """Run in a thread that Python did not start, as those of autograd on a GPU."""
    done = threading.Event()
    _thread.start_new_thread(lambda: (run(), done.set()), ())
    assert done.wait(60)


class TestRollback:
    def test_classes_are_as_before_whatever_is_raised_inside(self):
        model = build(upstreams.FIRST)
        expected = model(IMAGES)

        def fail(layer, weights):
            raise KeyError(layer)

        for error, arguments in (
            (KeyError, {"weights": fail}),
            (InvalidInputError, {"keys": slice(None)}),
            (OutOfRangeError, {"keys": [N]}),
            (InvalidInputError, {"weights": lambda _, weights: weights / 0}),
        ):
            with nothing_left(model), pytest.raises(error), edit(model, **arguments):
                model(IMAGES)
            assert_same_bits(model(IMAGES), expected)
        with nothing_left(model), pytest.raises(ZeroDivisionError), edit(model, heads=0):
            raise ZeroDivisionError

    def test_an_edit_that_is_left_first_leaves_the_other(self):
        model = build(upstreams.FIRST)
        with edit(model, keys=[2]):
            expected = model(IMAGES)
        with nothing_left(model):
            outer, inner = edit(model, heads={0: 0}), edit(model, keys=[2])
            outer.__enter__()
            inner.__enter__()
            model(IMAGES)
            outer.__exit__(None, None, None)
            assert_same_bits(model(IMAGES), expected)
            inner.__exit__(None, None, None)

    def test_install_and_uninstall_inside(self):
        model = build(upstreams.FIRST)
        with nothing_left(model), edit(model, heads={0: 0}):
            expected = model(IMAGES)
            with dinov2_attn.install("dinov2"):
                assert_same_bits(model(IMAGES), expected)
                weights = model.get_self_attention(IMAGES)
            assert_same_bits(model(IMAGES), expected)
        assert not weights[0][:, 0].any()


class TestThreads:
    def test_another_thread_is_not_edited(self):
        model = build(upstreams.FIRST)
        expected, found = model(IMAGES), []
        with edit(model, heads=0):
            edited = model(IMAGES)
            in_another_thread(lambda: found.append(model(IMAGES)))
            in_a_foreign_thread(lambda: found.append(model(IMAGES)))
        assert_same_bits(found, [expected] * 2)
        assert not same_bits(edited, expected)

    def test_each_thread_has_its_own_edits(self):
        model = build(upstreams.FIRST)
        kinds = [{"heads": 0}, {"heads": 1}, {"keys": [1]}, {"keys": [2], "queries": "cls"}]
        expected = []
        for kind in kinds:
            with edit(model, **kind):
                expected.append(model(IMAGES))
        barrier, found = threading.Barrier(len(kinds)), {}
        classes = {type(module) for module in model.modules()}
        before = {cls: dict(vars(cls)) for cls in classes}

        def work(i):
            barrier.wait()
            for _ in range(20):
                with edit(model, **kinds[i]):
                    found.setdefault(i, []).append(model(IMAGES))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(kinds))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, outputs in found.items():
            assert len(outputs) == 20
            for output in outputs:
                assert_same_bits(output, expected[i])
        assert not ACTIVE.on
        assert {cls: dict(vars(cls)) for cls in classes} == before

    def test_a_pass_in_another_thread_only_is_an_error(self):
        model = build(upstreams.FIRST)
        with pytest.raises(NotEditedError, match="no pass of 0, 1, 2"), edit(model, heads=0):
            in_another_thread(lambda: model(IMAGES))


# torch's reentrant checkpointing warns of inputs without gradients.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
class TestCheckpoints:
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize(
        "arguments",
        [
            {"heads": {1: 0}},
            {"keys": [2], "queries": "cls"},
            {"weights": lambda _, weights: weights.flip(1), "layers": [1]},
        ],
    )
    def test_what_runs_again_in_the_backward_pass_is_edited_again(self, arguments, reentrant):
        model = build(upstreams.FIRST)
        images = IMAGES.clone().requires_grad_()

        def gradient(run):
            with edit(model, **arguments):
                (found,) = torch.autograd.grad(run().square().sum(), images)
            return found

        expected = gradient(lambda: model(images))

        def checkpointed():
            x = model.prepare_tokens_with_masks(images)
            for block in model.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return model.head(model.norm(x)[:, 0])

        if reentrant:  # torch.autograd.grad does not reach into these

            def gradient(run):
                images.grad = None
                with edit(model, **arguments):
                    run().square().sum().backward()
                return images.grad

        assert_close(gradient(checkpointed), expected)

    def test_a_thread_of_autograds_runs_edited_again(self):
        """As on a GPU, whose backward pass is in a thread that Python did not start."""
        model = build(upstreams.FIRST)
        images = IMAGES.clone().requires_grad_()
        with edit(model, heads={1: 0}):
            (expected,) = torch.autograd.grad(model(images).square().sum(), images)
            x = model.prepare_tokens_with_masks(images)
            for block in model.blocks:
                x = checkpoint(block, x, use_reentrant=True)
            in_a_foreign_thread(model.head(model.norm(x)[:, 0]).square().sum().backward)
        assert_close(images.grad, expected)

    def test_a_backward_pass_after_the_block_is_no_other_gradient(self):
        model = build(upstreams.FIRST)
        images = IMAGES.clone().requires_grad_()
        with edit(model, heads={1: 0}):
            x = model.prepare_tokens_with_masks(images)
            for block in model.blocks:
                x = checkpoint(block, x, use_reentrant=False)
        with pytest.raises(Exception, match="different number of tensors|metadata"):
            x.sum().backward()


class TestLists:
    def test_lists_are_edited_batch_by_batch(self, grafted):
        model = build(grafted)
        images = [IMAGES, IMAGES[:1, :, :2]]
        arguments = {"keys": "patches", "queries": "cls", "layers": [0]}
        with edit(model, **arguments):
            found = model.get_self_attention(images)
            assert_all_close(found[0][1:], model.get_self_attention(images[1])[:1])
        assert not found[0][0][:, :, 0, 1:].any()
        assert found[0][0][:, :, 1:].all()


class TestCopies:
    def test_copies_and_pickles_made_inside_are_unedited_outside(self):
        model = build(upstreams.FIRST)
        expected = model(IMAGES)
        with edit(model, heads={1: 0}):
            edited = model(IMAGES)
            twin, packed = copy.deepcopy(model), pickle.dumps(model)
        assert not same_bits(edited, expected)
        assert_same_bits(twin(IMAGES), expected)
        assert_same_bits(pickle.loads(packed)(IMAGES), expected)

    def test_another_model_of_the_same_classes_is_not_edited(self):
        model, other = build(upstreams.FIRST), build(upstreams.FIRST)
        expected = other(IMAGES)
        with edit(model, heads={1: 0}):
            assert_same_bits(other(IMAGES), expected)
            assert not same_bits(model(IMAGES), expected)


class TestTraining:
    def test_stochastic_depth_and_dropout_run(self):
        model = build(upstreams.FIRST, drop_path_rate=0.3).train()
        for arguments in ({"heads": {1: 0}}, {"keys": [1], "queries": "cls"}):
            with edit(model, **arguments) as report:
                model(IMAGES.repeat(4, 1, 1, 1)).sum().backward()
            assert report.calls

    def test_a_kernel_that_drops_weights_draws_as_often_as_ever(self):
        """Its first call is not proved by another run, which would draw other numbers."""

        class Dropping(Attention):
            def forward(self, x):
                dropped = F.scaled_dot_product_attention(*self.project(x), dropout_p=0.5)
                return self.proj(dropped.transpose(1, 2).flatten(2))

        model, tokens = nn.Sequential(Dropping(), Dropping()), noise(1, 5, 8, seed=0).float()
        found = []
        for _ in range(2):
            with torch.random.fork_rng(), edit(model, keys=[1]):
                torch.manual_seed(0)
                output = model(tokens)
                found.append((output, torch.rand(3)))
            with torch.random.fork_rng(), record(model) as maps:
                torch.manual_seed(0)
                model(tokens)
            assert len(maps) == 1
        with torch.random.fork_rng():
            torch.manual_seed(0)
            plain = model(tokens), torch.rand(3)
        assert_same_bits(found[0], found[1])
        assert_same_bits(found[0][1], plain[1])
        assert not same_bits(found[0][0], plain[0])


class TestArtifacts:
    def test_attention_to_artifact_tokens_is_removed(self):
        model = build(upstreams.FIRST)
        found = artifact_tokens(model, IMAGES)
        mask = torch.zeros_like(found.mask)
        mask[0, 1, 2] = mask[1, 0, 1] = True
        with edit(model, keys=replace(found, mask=mask)), record(model) as maps:
            model(IMAGES)
        for weights in maps.patch_maps():
            assert not weights[0, ..., 1, 2].any()
            assert not weights[1, ..., 0, 1].any()
            assert weights[0, ..., 0, 1].all()


class Strange(Attention):
    """Its kernel is something else than attention."""

    def forward(self, x):
        query, key, value = self.project(x)
        out = Twice.apply_to(query, key, value)
        return self.proj(out.transpose(1, 2).flatten(2))


class Twice:
    @staticmethod
    def apply_to(query, key, value):
        return F.scaled_dot_product_attention(query, key, value) + F.scaled_dot_product_attention(
            key, query, value
        )


class OddHeads(Attention):
    """Explicit weights ``(B, Q, heads, N)``."""

    def forward(self, x):
        query, key, value = self.project(x)
        weights = (torch.einsum("bhqd,bhkd->bqhk", query, key) / 2).softmax(-1)
        return self.proj(torch.einsum("bqhk,bhkd->bqhd", weights, value).flatten(2))


MISTAKES = {
    "nothing to change": ({}, InvalidInputError, "Found none of them"),
    "two changes": ({"heads": 0, "keys": [1]}, InvalidInputError, "Found heads and keys"),
    "no such head": ({"heads": {1: [2]}}, OutOfRangeError, "between -2 and 1 of layer 1"),
    "no such layer": ({"heads": {7: [0]}}, OutOfRangeError, "blocks between -3 and 2"),
    "a head by name": ({"heads": "cls"}, InvalidInputError, "heads as whole numbers"),
    "a layer by its type": ({"heads": {1.5: [0]}}, InvalidInputError, "as whole numbers"),
    "layers twice": ({"heads": {1: [0]}, "layers": [1]}, InvalidInputError, "layers once"),
    "queries of a head": ({"heads": 0, "queries": "cls"}, InvalidInputError, "own rows"),
    "an unknown word": ({"keys": "clss"}, InvalidInputError, "'cls', 'registers'"),
    "an unknown word of queries": (
        {"keys": [1], "queries": "cIs"},
        InvalidInputError,
        "'cls', 'registers'",
    ),
    "a key out of range": ({"keys": [N]}, OutOfRangeError, f"between -{N} and {N - 1}"),
    "all keys": ({"keys": slice(None)}, InvalidInputError, "at least one key"),
    "all keys of an image": (
        {"keys": torch.tensor([[True] * N, [False] * N])},
        InvalidInputError,
        "at least one key",
    ),
    "a mask of another size": (
        {"keys": torch.ones(2, N + 1, dtype=torch.bool)},
        InvalidInputError,
        rf"a mask \(2, {N + 1}\)",
    ),
    "a mask of other images": (
        {"keys": torch.ones(3, N, dtype=torch.bool)},
        InvalidInputError,
        "for 2 images",
    ),
    "a mask of another grid": (
        {"keys": torch.ones(2, 3, 2, dtype=torch.bool)},
        InvalidInputError,
        r"a mask \(2, 3, 2\)",
    ),
    "a mask of four dimensions": (
        {"keys": torch.ones(1, 1, 1, 1, dtype=torch.bool)},
        InvalidInputError,
        "boolean mask",
    ),
    "no function": ({"weights": torch.ones(1)}, InvalidInputError, "to be a function"),
    "no tensor": ({"weights": lambda *_: None}, InvalidInputError, "Found NoneType"),
    "another shape": (
        {"weights": lambda _, weights: weights[:, :1]},
        InvalidInputError,
        rf"Found torch.float64 \(2, 1, {N}, {N}\)",
    ),
    "another dtype": (
        {"weights": lambda _, weights: weights.float()},
        InvalidInputError,
        "Found torch.float32",
    ),
    "another device": (
        {"weights": lambda _, weights: weights.to("meta")},
        InvalidInputError,
        "on meta",
    ),
    "NaN": (
        {"weights": lambda _, weights: weights * float("nan")},
        InvalidInputError,
        "returned at layer 0",
    ),
    "no maps": ({"frozen": [torch.ones(1)]}, InvalidInputError, "frozen to be AttentionMaps"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_named_and_leaves_nothing(kind):
    model = build(upstreams.FIRST)
    expected = model(IMAGES)
    arguments, error, words = MISTAKES[kind]
    with nothing_left(model), pytest.raises(error, match=words), edit(model, **arguments):
        model(IMAGES)
    assert_same_bits(model(IMAGES), expected)


class TestFrozenMistakes:
    def test_maps_that_do_not_fit(self):
        model = build(upstreams.FIRST)
        maps = attention_maps(model, IMAGES)
        wrong = maps.weights[0].clone()
        wrong[0, 0, 0, 0] = float("nan")
        twice = record(model)
        with twice as several:
            model(IMAGES)
            model(IMAGES)
        for frozen, error, words in (
            (attention_maps(model, IMAGES[..., :4]), InvalidInputError, "Found .2, 2, 5, 5."),
            (attention_maps(model, IMAGES, heads="mean"), InvalidInputError, "every head"),
            (maps.numpy(), InvalidInputError, "as tensors"),
            (replace(maps, weights=(wrong, *maps.weights[1:])), InvalidInputError, "layer 0"),
            (attention_maps(model, IMAGES.repeat(2, 1, 1, 1)), InvalidInputError, "2 or 1, 2"),
            (replace(maps, layers=(0, 1, 9)), OutOfRangeError, "blocks between"),
            (replace(maps, queries=(0,)), InvalidInputError, r"2 or 1, 2, 1, 7"),
            (several, InvalidInputError, r"recording\.passes\[0\]"),
        ):
            with (
                nothing_left(model),
                pytest.raises(error, match=words),
                edit(model, frozen=frozen),
            ):
                model(IMAGES)
        with (
            pytest.raises(OutOfRangeError, match="layers of the frozen maps: 0"),
            edit(model, [1], frozen=attention_maps(model, IMAGES, [0])),
        ):
            model(IMAGES)
        with (
            pytest.raises(InvalidInputError, match="own rows"),
            edit(model, frozen=maps, queries="cls"),
        ):
            model(IMAGES)


class TestModels:
    def test_a_model_without_attention_and_no_model(self):
        for model, words in ((nn.Linear(2, 2), "attention modules"), ("vit", "torch.nn.Module")):
            with pytest.raises(InvalidInputError, match=words), edit(model, heads=0):
                pass

    def test_a_model_that_does_not_run(self):
        model = build(upstreams.FIRST)
        with pytest.raises(NotEditedError, match="Found no pass"), edit(model, heads=0):
            pass
        x = model.prepare_tokens_with_masks(IMAGES)
        with pytest.raises(NotEditedError, match="Found none of 2"), edit(model, heads=0):
            model.blocks[1](model.blocks[0](x))
        with edit(model, [0, 1], heads=0):
            model.blocks[1](model.blocks[0](x))

    def test_a_kernel_outside_of_the_module_is_named(self):
        model, x = FromOutside(), noise(1, 3, 8, seed=0).float()
        with pytest.raises(NotEditedError, match=r"none of blocks\.2"), edit(model, heads=0):
            model(x)
        with edit(model, ["blocks.0"], heads=0):
            model(x)

    @pytest.mark.parametrize("cls", [ByHand, Strange])
    def test_what_cannot_be_seen_is_refused_by_name(self, cls):
        model = nn.Sequential(cls())
        with pytest.raises(NotRecordedError, match=cls.__name__), edit(model, heads=0):
            model(noise(1, 3, 8, seed=0).float())

    def test_explicit_code_that_keeps_heads_elsewhere_is_refused(self):
        model = nn.Sequential(OddHeads())
        model[0].num_heads = 2
        with (
            pytest.raises(NotEditedError, match="keeps its heads elsewhere"),
            edit(model, heads=0),
        ):
            model(noise(1, 5, 8, seed=0).float())

    def test_names_need_a_layout(self):
        model, x = Aggregator(), noise(2, 3, 5, 8, seed=0).float()
        with (
            pytest.raises(InvalidInputError, match="Pass positions"),
            edit(model, keys="patches", queries="cls"),
        ):
            model(x)
        with edit(model, keys=[1], queries="cls"):
            model(x)

    def test_a_kernel_that_is_something_else_is_not_edited(self, monkeypatch):
        """It is proved before a function is given its weights."""
        model = nn.Sequential(Attention())
        sdpa = F.scaled_dot_product_attention

        def scaled_dot_product_attention(query, key, value, **options):
            if torch.overrides.has_torch_function((query,)):
                return torch.overrides.handle_torch_function(
                    scaled_dot_product_attention, (query,), query, key, value, **options
                )
            return sdpa(query, key * 2, value, **options)

        monkeypatch.setattr(F, "scaled_dot_product_attention", scaled_dot_product_attention)
        with pytest.raises(UnfaithfulError, match="Attention"), edit(model, heads=0):
            model(noise(1, 3, 8, seed=0).float())


def through_blocks(model, tokens):
    for block in model.blocks:
        tokens = block(tokens)
    return tokens


def test_positions_of_any_kind_hide_the_same_keys():
    model = build(upstreams.FIRST)
    with edit(model, keys=[2, 3]):
        expected = model(IMAGES)
    for keys in (torch.tensor([2, 3]), torch.tensor([2, 3]).numpy(), array.array("l", [2, 3])):
        with edit(model, keys=keys):
            assert_same_bits(model(IMAGES), expected)


def test_tokens_that_came_from_no_images_have_patches_in_a_row():
    model, tokens = build(upstreams.FIRST), noise(2, N, 8, seed=3, dtype=torch.float64)
    mask = torch.tensor([[[False, True, False], [True, False, False]]])
    with edit(model, keys=[2, 4]):
        expected = through_blocks(model, tokens)
    with edit(model, keys=mask):
        assert_same_bits(through_blocks(model, tokens), expected)
    with edit(model, keys="patches"):  # of which there are none
        alone = through_blocks(model, tokens[:, :1])
    assert_same_bits(alone, through_blocks(model, tokens[:, :1]))


@pytest.mark.parametrize("name", ["frozen", "heads"])
def test_frozen_maps_and_heads_have_their_own_rows(name):
    model = build(upstreams.FIRST)
    given = {"frozen": attention_maps(model, IMAGES), "heads": [0]}[name]
    with (
        pytest.raises(InvalidInputError, match=f"as {name}= has its own rows"),
        edit(model, queries="cls", **{name: given}),
    ):
        pass


@pytest.mark.parametrize("given", [{"keys": "register"}, {"keys": [1], "queries": "register"}])
def test_an_unknown_word_is_an_error_before_any_pass(given):
    model = build(upstreams.FIRST)
    with pytest.raises(InvalidInputError, match="register'"), edit(model, **given):
        raise AssertionError("entered")


def test_a_model_of_the_same_class_inside_a_pass_is_not_asked_for_its_layout():
    """A graft stands on a class, so a teacher's images come by too. They cost no probe."""
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 12, "num_heads": 2, "depth": 2}
    student, teacher, other = (
        timm.models.VisionTransformer(dynamic_img_size=True, **sizes).eval() for _ in range(3)
    )
    other.load_state_dict(student.state_dict())
    others, images, found = noise(1, 3, 48, 64, seed=0), noise(1, 3, 32, 48, seed=1), []

    def run_teacher(*_):
        teacher(others)

    student.pos_drop.register_forward_hook(run_teacher)
    for model in (student, other):
        runs = []
        model.patch_embed.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        with torch.no_grad(), edit(model, keys="patches", queries="cls"):
            found.append((model(images), len(runs)))
    assert_same_bits(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] > 1
