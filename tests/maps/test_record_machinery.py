"""`record` under checkpointing, copies, autocast, wrappers and overrides."""

from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dinov2_attn
from dinov2_attn import record
from dinov2_attn.errors import NotRecordedError
from tests.support.recordings import IMAGES, Around, assert_all_close, assert_nothing_on, build
from tests.support.strategies import noise
from tests.support.tolerances import assert_close
from tests.support.xformers_visibility import quiet


class Checkpointed(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("where", ["block", "model"])
def test_checkpointing_is_recorded_once_and_differentiates(models, reentrant, where):
    model = build(models)
    images = IMAGES.clone().requires_grad_()
    expected = model.get_self_attention(images)
    model(images).square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    subject = model
    if where == "model":
        subject = Checkpointed(model, reentrant)
    else:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = Checkpointed(block, reentrant)
    with record(subject) as maps:
        subject(images).square().sum().backward()
    assert len(maps.passes) == 1
    assert_all_close(maps.weights, expected)
    again = [p.grad for p in model.parameters() if p.grad is not None]
    assert_close(again, grads)
    if not reentrant:
        model.zero_grad()
        with record(subject) as maps:
            subject(images)
        maps.weights[2].square().sum().backward()  # behind the block: recomputes for it
        recomputed = model.patch_embed.proj.weight.grad.clone()
        model.zero_grad()
        expected[2].square().sum().backward()
        assert_close(recomputed, model.patch_embed.proj.weight.grad)


def test_a_pass_that_is_run_again_in_the_middle_of_another_is_not_its_beginning(models):
    model = build(models)
    subject, outputs = Checkpointed(model, reentrant=False), []

    def differentiate(*_):
        if len(outputs) == 1:
            outputs.pop().sum().backward()

    model.blocks[1].register_forward_hook(differentiate)
    with record(subject) as maps:
        outputs.append(subject(IMAGES))
        subject(IMAGES)
    assert not outputs
    assert [one.grid for one in maps.passes] == [(2, 3), (2, 3)]


def test_copies_pickles_and_states_know_of_no_recording(models):
    model = build(models)
    keys, attributes = list(model.state_dict()), set(vars(model))
    with record(model):
        model(IMAGES)
        twin = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        assert list(model.state_dict()) == keys
        assert set(vars(model)) == attributes
        assert_nothing_on_modules(twin)
        twin(IMAGES)  # another model: not recorded
    buffer.seek(0)
    options = {} if torch.__version__ < "2.1" else {"weights_only": False}
    for other in (twin, torch.load(buffer, **options)):
        assert_nothing_on(other)
        with record(other) as maps:
            other(IMAGES)
        assert_close(maps.weights, model.get_self_attention(IMAGES))


def assert_nothing_on_modules(model):
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_autocast_is_recorded_in_the_dtype_of_the_kernel(models):
    model = build(models).float()
    with torch.autocast("cpu", dtype=torch.bfloat16), record(model) as maps:
        model(IMAGES.float())
    assert {w.dtype for w in maps.weights} == {torch.bfloat16}


def test_wrappers_of_blocks_and_attention_are_looked_into(models):
    model = build(models)
    expected = model.get_self_attention(IMAGES)
    model.blocks[0] = Around(model.blocks[0])
    model.blocks[2].attn = Around(model.blocks[2].attn)
    with record(model) as maps:
        model(IMAGES)
    assert_all_close(maps.weights, expected)


def test_overrides_that_call_their_base_are_recorded_once(models):
    model = build(models)
    expected = model.get_self_attention(IMAGES)
    names = {"prepare_tokens_with_masks": None, "forward_features": None}
    for name in names:
        names[name] = _handing_on(model, name)
    model.__class__ = type("Own", (type(model),), names)
    attention = model.blocks[1].attn
    attention.__class__ = type(
        "Own", (type(attention),), {"forward": _handing_on(attention, "forward")}
    )
    with dinov2_attn.install(model), record(model) as maps:
        model(IMAGES)
    assert_all_close(maps.weights, expected)
    assert maps.grid == (2, 3)


@quiet
def test_the_grids_of_a_list_are_those_of_its_elements_under_an_override_too(nested):
    block = partial(nested.cls("NestedTensorBlock"), attn_class=nested.cls("MemEffAttention"))
    model = build(nested, block_fn=block)
    name = "prepare_tokens_with_masks"
    model.__class__ = type("Own", (type(model),), {name: _handing_on(model, name)})
    with dinov2_attn.install(model), record(model, [0]) as maps:
        model.prepare_tokens_with_masks(IMAGES)  # and not used
        model.blocks[0]([model.prepare_tokens_with_masks(x) for x in (IMAGES, IMAGES[..., :2])])
        model.prepare_tokens_with_masks(IMAGES)  # and not used
        model.blocks[0](noise(1, 6, 8, seed=0).double())
    assert [one.grid for one in maps.passes] == [(2, 3), (2, 1), None]


def test_a_projection_that_runs_twice_is_recorded_as_the_kernel_has_it(models):
    model = build(models)
    expected = model.get_self_attention(IMAGES)
    attention = model.blocks[1].attn
    base = type(attention)

    def forward(self, x):
        self.qkv(x * 2)
        return base.forward(self, x)

    attention.__class__ = type("Own", (base,), {"forward": forward})
    with record(model) as maps:
        model(IMAGES)
    assert_all_close(maps.weights, expected)
    assert_nothing_on(model)


def test_a_kernel_that_runs_twice_is_refused(models):
    """Which of the two makes the features cannot be told."""
    model = build(models)
    attention = model.blocks[1].attn
    base = type(attention)

    def forward(self, x):
        return base.forward(self, x) + base.forward(self, x)

    attention.__class__ = type("Own", (base,), {"forward": forward})
    with pytest.raises(NotRecordedError, match="2 calls"), record(model):
        model(IMAGES)
    assert_nothing_on(model)


def _handing_on(module, name):
    cls = type(module)
    return lambda self, x, *others: getattr(cls, name)(self, x, *others)


def test_wrapped_and_data_parallel_models_are_found(models):
    model = build(models)
    wrapped = nn.Sequential(nn.DataParallel(model))  # on a CPU it calls the module itself
    with record(wrapped) as maps:
        wrapped(IMAGES)
    assert_close(maps.weights, model.get_self_attention(IMAGES))
