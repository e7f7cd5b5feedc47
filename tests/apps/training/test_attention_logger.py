"""Attention maps in the log of a training, which does not notice them."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dinov2_attn
from dinov2_attn import AttentionLogger, attention_maps
from dinov2_attn.errors import InvalidInputError, NotDrawnWarning
from tests.support.compiling import compiles
from tests.support.extraction import build, draw
from tests.support.recordings import assert_nothing_on
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, assert_same_bits, same_bits

pytest.importorskip("matplotlib")
INPUT = noise(3, 4, 6, seed=3)


class Pages:
    """What takes images as a SummaryWriter does."""

    def __init__(self):
        self.pages = {}

    def add_image(self, name, pixels, global_step, dataformats):
        assert dataformats == "HWC"
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
        self.pages[name, global_step] = pixels

    @property
    def names(self):
        return [name for name, _ in self.pages]

    @property
    def steps(self):
        return list(dict.fromkeys(step for _, step in self.pages))


class Student(nn.Module):
    """A backbone with what a training has: BatchNorm, dropout, random numbers of three kinds."""

    def __init__(self, upstream):
        super().__init__()
        self.backbone = build(upstream, drop_path_rate=0.3)
        self.norm = nn.BatchNorm1d(8)
        self.backbone.head = nn.Sequential(nn.Dropout(0.2), nn.BatchNorm1d(8))

    def forward(self, x):
        x = x + random.random() + float(np.random.rand())
        return self.norm(self.backbone(x))


def trained(upstream, every=None, *, autocast=False, wrap=lambda model: model):
    """Train a few steps; return all that a training has afterwards."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = wrap(Student(upstream).train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    to = Pages()
    pictures = every and AttentionLogger(model, [INPUT, INPUT.flip(-1)], to, every=every)
    left = []
    for step in range(5):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            images = torch.randn(4, 3, 4, 6)
            if pictures:  # inside of autocast, where its cache of weights lives
                assert pictures(step) == (step % every == 0)
            loss = model(images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        left.append(loss.detach())
        left += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        assert torch.is_grad_enabled()
        assert all(module.training for module in model.modules())
    left += [torch.get_rng_state(), torch.as_tensor(random.getstate()[1][:600])]
    left += [torch.as_tensor(np.random.get_state()[1].astype(np.int64))]
    left += [tensor.clone() for tensor in model.state_dict().values()]
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    return left, to


@pytest.mark.parametrize("autocast", [False, True])
def test_a_training_is_the_same_bit_for_bit(first, autocast):
    without, _ = trained(first, autocast=autocast)
    left, to = trained(first, every=2, autocast=autocast)
    assert_same_bits(left, without)
    assert len(left) > 100
    assert to.steps == [0, 2, 4]
    assert to.names[:2] == ["attention/layer2/mean/cls/0", "attention/layer2/mean/cls/1"]
    pages = [to.pages["attention/layer2/mean/cls/0", step] for step in to.steps]
    assert not same_bits(pages[0], pages[1])  # the weights have changed


@pytest.mark.parametrize("installed", [False, True])
def test_it_draws_what_attention_maps_returns(first, installed, monkeypatch):
    drawn = []
    from dinov2_attn.apps.viz import pictures

    plot = pictures.plot
    monkeypatch.setattr(pictures, "plot", lambda maps, **o: drawn.append(maps) or plot(maps, **o))
    if installed:
        dinov2_attn.install()
    model = build(first).train()
    with torch.autocast("cpu", torch.bfloat16):  # which pictures do without
        AttentionLogger(model, INPUT, Pages(), layers=None, queries=["cls", (1, 2)])(7)
    maps = attention_maps(model.eval(), INPUT[None], queries=[0, 6])
    assert len(drawn) == 6
    assert drawn[0].weights[0].dtype == torch.float32
    assert_close(list(drawn[0].weights), list(maps.weights))


def test_names_are_by_layer_head_query_and_image(first):
    to = Pages()
    options = {"layers": [0, -1], "queries": ["cls", (0, 1), 3], "heads": [1, "mean"]}
    AttentionLogger(build(first), INPUT, to, name="teacher", **options)(12)
    assert sorted(to.names) == sorted(
        f"teacher/layer{layer}/{head}/{query}/0"
        for layer in (0, 2)
        for head in ("head1", "mean")
        for query in ("cls", "patch_0_1", "token_3")
    )
    assert to.steps == [12]
    each = Pages()
    AttentionLogger(build(first), INPUT, each, heads=None)(0)
    assert each.names == [f"attention/layer2/head{i}/cls/0" for i in (0, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_any_dtype_is_drawn(first, dtype):
    to = Pages()
    assert AttentionLogger(build(first).to(dtype), INPUT, to)(0)
    assert len(to.pages) == 1


def test_every_kind_of_image_is_taken(first, tmp_path):
    path = draw(tmp_path / "a.png", (4, 6), 0)
    with Image.open(path) as opened:
        images = [path, str(path), opened.copy(), np.asarray(opened), INPUT]
    to = Pages()
    AttentionLogger(build(first), images, to)(0)
    assert len(to.pages) == 5
    same = [to.pages[f"attention/layer2/mean/cls/{i}", 0] for i in range(4)]
    for one in same:
        assert_same_bits(one, same[0])
    batch = Pages()
    AttentionLogger(build(first), torch.stack([INPUT, INPUT]), batch)(0)
    assert len(batch.pages) == 2


@pytest.mark.parametrize(
    ("every", "steps", "drawn"),
    [
        (2, range(6), [0, 2, 4]),
        (25, range(0, 100, 10), [0, 30, 50, 80]),  # a loop that calls every tenth step
        (10, [7, 8, 12, 13, 20], [7, 12, 20]),  # that was resumed
        (10, [3, 3, 3], [3]),  # that accumulates gradients
    ],
)
def test_a_picture_comes_when_enough_steps_have_passed(first, every, steps, drawn):
    to = Pages()
    pictures = AttentionLogger(build(first), INPUT, to, every=every)
    assert [step for step in steps if pictures(np.int64(step))] == drawn == to.steps


def test_a_student_and_its_teacher_are_told_apart(first):
    both = nn.ModuleDict({"student": Student(first), "teacher": Student(first)})
    with pytest.raises(InvalidInputError, match=r"backbone='student\.backbone'"):
        AttentionLogger(both, INPUT, Pages())
    for chosen in ("teacher.backbone", both["teacher"].backbone):
        pictures = AttentionLogger(both, INPUT, Pages(), backbone=chosen)
        assert pictures.backbone is both["teacher"].backbone
        assert pictures(0)
    with pytest.raises(InvalidInputError, match=r"Did you mean 'teacher\.backbone'"):
        AttentionLogger(both, INPUT, Pages(), backbone="teacher.backbon")


def test_models_of_other_libraries_are_found_inside(first):
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
    to = Pages()
    pictures = AttentionLogger(nn.Sequential(vit, nn.Linear(192, 3)), noise(3, 32, 32, seed=0), to)
    assert pictures.backbone is vit
    assert pictures(0)
    assert to.names == ["attention/layerblocks.1.attn/mean/cls/0"]


def test_an_image_of_a_size_that_the_model_refuses_is_said_before_the_training(tmp_path):
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
    draw(tmp_path / "a.png", (32, 48), 0)
    with pytest.raises(InvalidInputError, match=r"one of 32 × 48 \(AssertionError.*32"):
        AttentionLogger(vit, str(tmp_path / "a.png"), Pages())
    assert AttentionLogger(vit, noise(3, 32, 32, seed=0), Pages())(0)


def test_wrappers_are_looked_through(first):
    student = Student(first)
    for wrapped in (nn.DataParallel(student), nn.Sequential(nn.DataParallel(student))):
        assert AttentionLogger(wrapped, INPUT, Pages()).backbone is student.backbone
    pictures = AttentionLogger(nn.DataParallel(student), INPUT, Pages(), backbone="backbone")
    assert pictures.backbone is student.backbone


def whole(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.backbone.compile(backend="eager")
    return model


def by_block(model):
    blocks = model.backbone.blocks
    for i, block in enumerate(blocks):
        blocks[i] = torch.compile(block, backend="eager")
    return model


@pytest.mark.skipif(not compiles(), reason="this torch cannot compile on this Python")
@pytest.mark.skipif(
    not hasattr(getattr(torch, "compiler", None), "set_stance"),
    reason="this torch has no set_stance: a compiled model is refused",
)
@pytest.mark.filterwarnings("ignore")  # Dynamo's own differ from version to version
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("wrap", [whole, in_place, by_block])
@pytest.mark.parametrize("installed", [False, True])
def test_a_compiled_training_is_the_same(first, wrap, installed):
    if installed:
        dinov2_attn.install()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    without, _ = trained(first, wrap=wrap)
    compiled = graphs["unique_graphs"]
    torch._dynamo.reset()
    graphs.clear()
    left, to = trained(first, every=2, wrap=wrap)
    assert_same_bits(left, without)
    assert graphs["unique_graphs"] == compiled > 0
    assert to.steps == [0, 2, 4]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": [3]}, "blocks between"),
        ({"queries": "register:1"}, "a model with registers"),
        ({"queries": (2, 0)}, "2, 0"),
        ({"queries": []}, "at least one query"),
        ({"heads": 2}, "2"),
        ({"heads": "max"}, "max"),
        ({"every": 0}, "every of 1 at least"),
        ({"every": 0.5}, "whole numbers"),
        ({"images": []}, "at least one image"),
        ({"images": noise(3, 5, 7, seed=0)}, "multiples"),
        ({"images": "absent.png"}, "absent.png"),
        ({"to": object()}, "SummaryWriter"),
        ({"to": []}, "SummaryWriter"),
        ({"model": nn.Linear(3, 3)}, "one vision transformer"),
        ({"model": "vits"}, "Pass the module itself"),
    ],
)
def test_a_wrong_argument_raises_before_the_training(first, wrong, message):
    given = {"model": build(first).train(), "images": INPUT, "to": Pages(), **wrong}
    with pytest.raises(dinov2_attn.Dinov2AttnError, match=message):
        AttentionLogger(**given)
    if isinstance(given["model"], nn.Module):
        assert given["model"].training
        assert_nothing_on(given["model"])


class Full(Pages):
    def add_image(self, *_, **__):
        raise OSError("no space left")


def test_a_failure_warns_once_and_the_training_goes_on(first):
    model = build(first).train()
    pictures = AttentionLogger(model, INPUT, Full())
    with pytest.warns(NotDrawnWarning, match="step 0 was not drawn \\(OSError: no space left"):
        assert not pictures(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not pictures(1)
    assert model.training
    assert torch.is_grad_enabled()
    assert_nothing_on(model)


def test_a_failure_is_a_line_of_the_log_where_warnings_are_errors(first, caplog):
    pictures = AttentionLogger(build(first), INPUT, Full())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not pictures(0)
    assert "step 0 was not drawn" in caplog.text


def test_a_failure_in_the_model_leaves_it_as_it_was(first):
    model, to = build(first).train(), Pages()
    pictures = AttentionLogger(model, INPUT, to)
    hook = model.blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.warns(NotDrawnWarning, match="ZeroDivisionError"):
        pictures(0)
    hook.remove()
    assert model.training
    assert_nothing_on(model)
    assert pictures(1)
    assert to.steps == [1]


def test_an_interruption_is_not_swallowed(first):
    model = build(first)
    pictures = AttentionLogger(model, INPUT, Pages())

    def interrupt(*_):
        raise KeyboardInterrupt

    model.blocks[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        pictures(0)
