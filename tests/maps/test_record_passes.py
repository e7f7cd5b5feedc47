"""`record`: several passes, several recordings, and what is said of those that were missed."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import attrgetter, methodcaller

import pytest
import torch
from torch import nn

import dinov2_attn
from dinov2_attn import record
from dinov2_attn.errors import InvalidInputError, NotRecordedError, OutOfRangeError
from dinov2_attn.grafting.channel import STATE
from tests.support.installing import uninstalled
from tests.support.recordings import IMAGES, N, assert_all_close, assert_nothing_on, build
from tests.support.tolerances import assert_close, assert_same_bits

# Several passes, several recordings


def test_every_pass_has_its_maps(models):
    model = build(models)
    batches = [IMAGES, IMAGES[:1, :, :2], IMAGES]
    with torch.no_grad(), record(model, 2, queries="cls") as maps:
        for i, images in enumerate(batches):
            model(images)
            assert len(maps.passes) == i + 1
    for one, images in zip(maps.passes, batches, strict=True):
        expected = model.get_self_attention(images, 2, queries="cls")
        assert_all_close(one.weights, expected)
    assert [one.grid for one in maps.passes] == [(2, 3), (1, 3), (2, 3)]
    asked = {name: attrgetter(name) for name in ("weights", "layers", "grid", "prefix", "queries")}
    called = ("patch_maps", "prefix_mass", "cpu", "numpy")
    asked["to"] = methodcaller("to", "cpu")
    asked |= {name: methodcaller(name) for name in called}
    asked["save"] = methodcaller("save", "absent.safetensors")
    for name, ask in asked.items():
        words = rf"(?s)one recorded pass, whose {name}.*Found 3.*\.passes"
        with pytest.raises(NotRecordedError, match=words):
            ask(maps)
    with pytest.raises(AttributeError, match="'Recording' object has no .* 'nothing_like_that'"):
        _ = maps.nothing_like_that
    assert not hasattr(maps, "__dataclass_fields__")
    assert list(maps) == [maps[0], maps[1], maps[-1]] == maps.passes
    assert maps[1:] == maps.passes[1:]
    assert len(maps) == 3
    assert repr(maps).startswith(
        "Recording(passes=3, layers=1–2, weights=various, grid=various, prefix=1"
    )
    assert len(copy.deepcopy(maps).passes) == 3
    assert len(pickle.loads(pickle.dumps(maps)).passes) == 3


def test_passes_may_be_taken_as_they_come(models):
    model = build(models)
    with record(model) as maps:
        for _ in range(3):
            model(IMAGES)
            assert maps.weights[0].shape == (2, 2, N, N)
            maps.passes.clear()
    assert maps.passes == []


def test_recordings_may_be_nested(models):
    model, other = build(models), build(models, depth=2)
    both = nn.ModuleList([model, other])
    with record(model) as outer:
        with record(model, 1, queries="cls", heads="mean") as inner, record(other) as second:
            model(IMAGES)
            other(IMAGES)
        model(IMAGES)
        assert len(inner.passes) == len(second.passes) == 1
    assert len(outer.passes) == 2
    assert_close(outer.passes[0].weights, outer.passes[1].weights)
    assert_close(inner.weights[0], outer.passes[0].weights[2][:, :, :1].mean(1))
    assert len(second.weights) == 2
    assert_nothing_on(both)


def test_what_is_asked_inside_is_answered_and_not_recorded(models):
    model = build(models)
    expected = model.get_self_attention(IMAGES)
    masks = torch.arange(6)[None].expand(2, -1) > 3
    ask = partial(model.get_self_attention, IMAGES, [1], masks, queries="cls", heads="mean")
    (chosen,) = ask()
    with record(model) as maps:
        assert_close(model.get_self_attention(IMAGES), expected)
        assert_close(*ask(), chosen)
        assert_close(model.get_last_self_attention(IMAGES), expected[-1])
        assert len(model.get_self_attention([IMAGES, IMAGES], 2)) == 2
        tokens = model.prepare_tokens_with_masks(IMAGES)
        model.blocks[0](tokens, return_attention=True)
        model.blocks[0].attn(tokens, return_attn=True)
        assert maps.passes == []
        _, attentions = model(IMAGES, return_attention=True)
    assert len(maps.passes) == 1
    for a, b, c in zip(maps.weights, attentions, expected, strict=True):
        assert_close(a, b)
        assert_close(a, c)


def test_images_given_by_name_have_their_grid(models):
    model = build(models)
    with record(model) as maps:
        tokens = model.prepare_tokens_with_masks(x=IMAGES)
        for block in model.blocks:
            tokens = block(tokens)
    assert maps.grid == (2, 3)


def test_a_grid_that_is_not_known_may_be_said(models):
    """What the error advises is done, to a recording's pass: the recording is no dataclass."""
    model = build(models)
    tokens = model.prepare_tokens_with_masks(IMAGES)
    with record(model) as maps:
        for block in model.blocks:
            tokens = block(tokens)
    with pytest.raises(InvalidInputError, match=r"(?s)dataclasses\.replace.*\.passes\[0\]"):
        maps.patch_maps()
    said = dataclasses.replace(maps.passes[0], grid=(2, 3))
    assert said.patch_maps()[0].shape == (2, 2, N, 2, 3)


def test_reduce_may_run_models_itself(models):
    model = build(models)
    with record(model, reduce=lambda layer, w: model(IMAGES)) as maps:
        expected = model(IMAGES)
    assert len(maps.passes) == 1
    for kept in maps.weights:
        assert_same_bits(kept, expected)


def test_threads_do_not_see_each_other(models):
    model, failures, counts = build(models), [], []
    expected = model.get_self_attention(IMAGES)

    def work(recording):
        try:
            for _ in range(10):
                if not recording:
                    model(IMAGES)
                    continue
                with record(model) as maps:
                    model(IMAGES)
                counts.append(len(maps.passes))
                assert_all_close(maps.weights, expected)
        except BaseException as error:  # reported below, out of the thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i < 3,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert counts == [1] * 30
    assert_nothing_on(model)


def test_a_pass_in_another_thread_is_not_recorded(models):
    model, other = build(models), ThreadPoolExecutor(1)
    with pytest.raises(NotRecordedError, match="in the same thread"), record(model):
        other.submit(model, IMAGES).result()
    other.shutdown()


# What was missed is said


def test_nothing_recorded_is_an_error(models):
    model = build(models)
    with (
        pytest.raises(NotRecordedError, match=r"layers 0, 1, 2\.\nFound 0 of them\."),
        record(model),
    ):
        pass
    assert_nothing_on(model)


@pytest.mark.parametrize("blocks", [[0], [1], [2]])
@pytest.mark.parametrize(
    "order", [[True, False], [False, True], [True, False, True], [False, False]]
)
def test_a_pass_without_some_layers_is_an_error(models, blocks, order):
    """As where a block was exported or scripted: something without a graft runs in its place."""
    model, caught = build(models), []
    attentions = [model.blocks[i].attn for i in blocks]

    def run():
        with record(model) as maps:
            caught.append(maps)
            for sees in order:
                for attention in attentions:
                    vars(attention).pop("forward", None)
                    if not sees:
                        attention.forward = lambda x: x
                model(IMAGES)

    words = rf"layers 0, 1, 2\.\nFound {sum(order)} of them, and {order.count(False)} without"
    with pytest.raises(NotRecordedError, match=words):
        run()
    assert len(caught[0].passes) == sum(order)


def test_a_failing_pass_leaves_nothing_on_and_no_maps(models):
    model = build(models)

    def fail(*_):
        raise ZeroDivisionError

    for place in (model.blocks[1].mlp, model.blocks[1].attn.qkv, model.blocks[1].attn.proj):
        hook = place.register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError), record(model) as maps:
            model(IMAGES)
        hook.remove()
        assert maps.passes == []
        assert_nothing_on(model)
    with pytest.raises(ZeroDivisionError), record(model, reduce=fail):
        model(IMAGES)
    assert_nothing_on(model)
    with record(model) as maps:
        model(IMAGES)
    assert len(maps.passes) == 1


def test_what_cannot_be_recorded_is_refused_at_once(models):
    model, holding = build(models), build(models)
    holding.teacher = model
    cases = [
        (nn.Linear(2, 2), {}, InvalidInputError, "(?s)with attention modules.*.\nFound none"),
        (nn.MultiheadAttention(2, 1), {}, InvalidInputError, "need_weights=True"),
        ("model", {}, InvalidInputError, "a model"),
        (holding, {"layers": ["blocks.9.attn"]}, OutOfRangeError, "Did you mean 'blocks"),
        (model, {"layers": ["nothing"]}, OutOfRangeError, "Leave layers out for all"),
        (model, {"check": "sometimes"}, InvalidInputError, 'check="every"'),
        (model, {"layers": 4}, OutOfRangeError, "between 0 and 3"),
        (model, {"layers": []}, InvalidInputError,
         r"^Expected at least one layer to record\.\nFound layers=\[\]\.\nLeave layers out"),
        (model, {"queries": "cs"}, InvalidInputError, "cls"),
        (model, {"heads": "max"}, InvalidInputError, "heads"),
        (model, {"reduce": "mean"}, InvalidInputError, "reduce"),
    ]  # fmt: skip
    for subject, options, error, words in cases:
        with pytest.raises(error, match=words), record(subject, **options):
            raise AssertionError("entered")
        assert STATE.receivers == ()


def test_a_model_that_was_never_grafted_is_recorded(models):
    model = build(models)
    expected = model.get_self_attention(IMAGES)
    with uninstalled():
        attention = type(model.blocks[0].attn)
        forward = attention.forward
        features = model(IMAGES)
        with record(model, check="every") as maps:
            recorded = model(IMAGES)
        assert attention.forward is forward
        assert_same_bits(recorded, features)
        assert_all_close(maps.weights, expected)
        assert (maps.grid, maps.prefix) == ((2, 3), 1)


def test_several_models_in_one_are_told_apart(models):
    pair = nn.ModuleDict({"teacher": build(models), "student": build(models)})
    with record(pair) as maps:
        for model in pair.values():
            model(IMAGES)
    layers = [layer for one in maps for layer in one.layers]
    assert layers == [name for name, m in pair.named_modules() if name.endswith("attn")]
    expected = [w for model in pair.values() for w in model.get_self_attention(IMAGES)]
    assert_all_close([w for one in maps for w in one.weights], expected)
    with record(pair, ["student.blocks.1.attn"]) as one:
        for model in pair.values():
            model(IMAGES)
    assert_close(one.weights[0], pair["student"].get_self_attention(IMAGES)[1])


def test_the_public_names_are_there_when_they_are_asked_for():
    assert dinov2_attn.record is record
    assert {"record", "AttentionMaps", "Recording"} <= set(dinov2_attn.__all__)
    assert all(hasattr(dinov2_attn, name) for name in dinov2_attn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'recrod'"):
        _ = dinov2_attn.recrod


class BlockByBlock(nn.Module):
    """Runs each block on every batch of a list before the next block."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, batches):
        tokens = [self.inner.prepare_tokens_with_masks(images) for images in batches]
        for block in self.inner.blocks:
            tokens = [block(one) for one in tokens]
        return tokens


@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_a_list_that_runs_block_by_block_has_an_entry_for_each_batch(models, layers):
    inner = build(models)
    model, batches = BlockByBlock(inner), [IMAGES, IMAGES[:1, ..., :2], IMAGES[:1]]
    with record(model, layers) as maps:
        model(batches)
        model(batches[:1])
    assert [one.grid for one in maps] == [(2, 3), (2, 1), (2, 3), (2, 3)]
    for one, images in zip(maps, [*batches, IMAGES], strict=True):
        assert_all_close(one.weights, inner.get_self_attention(images, layers))
