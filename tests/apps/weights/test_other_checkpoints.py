"""Checkpoints of upstream's relatives: DINO v1, exports without a mask token, fine-tuned models."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import torch
from torch import nn

import dinov2_attn
from dinov2_attn.apps.weights.architecture import infer
from dinov2_attn.apps.weights.checkpoints import fill, load_checkpoint
from dinov2_attn.apps.weights.models import build_like
from dinov2_attn.apps.weights.reading import read
from dinov2_attn.errors import InvalidInputError, UnreadableFileError
from tests.apps.weights.test_architecture import SMALL
from tests.support import checkpoint_files, upstreams
from tests.support.strategies import noise, randomise
from tests.support.tolerances import assert_close

V1 = replace(SMALL, embed_dim=128, num_heads=2, patch_size=8, img_size=32, layer_scale=False)


@pytest.fixture(scope="module", autouse=True)
def _grafted():
    with dinov2_attn.install(upstreams.FIRST.package):
        yield


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights.pth"


def random(architecture, seed=0):
    return randomise(build_like(architecture), seed)


def without_mask(model):
    return {k: v for k, v in model.state_dict().items() if k != "mask_token"}


def built_of(file, **options):
    checkpoint = read(file)
    model = build_like(infer(checkpoint, **options))
    return model, fill(model, checkpoint, **options)


def assert_attend_alike(ours, theirs, side=32):
    images = noise(2, 3, side, side, seed=1)
    with torch.no_grad():
        for mine, other in zip(
            ours.get_self_attention(images, n=2),
            theirs.get_self_attention(images, n=2),
            strict=True,
        ):
            assert_close(mine, other)


@pytest.mark.parametrize("patch_size", [8, 16])
def test_dino_v1_bare(file, patch_size, caplog):
    caplog.set_level("INFO", "dinov2_attn")
    model = random(replace(V1, patch_size=patch_size))
    torch.save(without_mask(model), file)
    found, left_out = built_of(file)
    assert left_out == ()
    assert not found.mask_token.any()
    assert "mask_token is not in the file: set to zeros" in caplog.text
    assert isinstance(found.blocks[0].ls1, nn.Identity)
    assert_attend_alike(found, model)


def full(teacher, student):
    """As main_dino.py writes it: wrapped, with a head, and its options as they were parsed."""
    heads = {"head.mlp.0.weight": torch.ones(3, 3), "head.last_layer.weight_v": torch.ones(3, 3)}
    backbones = [without_mask(model) for model in (student, teacher)]
    states = [{**{f"backbone.{k}": v for k, v in state.items()}, **heads} for state in backbones]
    return {
        "student": {f"module.{k}": v for k, v in states[0].items()},
        "teacher": states[1],
        "optimizer": checkpoint_files.OPTIMIZER,
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=8),
        "dino_loss": {"center": torch.zeros(1, 3)},
        "fp16_scaler": None,
    }


@pytest.mark.skipif(
    not hasattr(torch.serialization, "safe_globals"), reason="before torch 2.5 no options are read"
)
def test_dino_v1_full(file):
    teacher, student = random(V1, 0), random(V1, 1)
    torch.save(full(teacher, student), file)
    found, left_out = built_of(file)
    assert {"student", "teacher.head", "args", "epoch", "optimizer", "dino_loss"} <= set(left_out)
    assert_attend_alike(found, teacher)
    found, left_out = built_of(file, key="student")
    assert {"teacher", "student.head"} <= set(left_out)
    assert_attend_alike(found, student)


@pytest.mark.parametrize(
    "name",
    ["head.weight", "head.fc1.weight", "fc.bias", "classifier.weight", "linear_head.weight",
     "heads.head.weight", "dino_head.mlp.0.weight", "ibot_head.last.weight", "head_dist.weight",
     "mlp_head.1.bias", "aux_classifier.0.weight", "fc_norm.weight", "pooler.dense.bias",
     "decoder.0.weight"],
)  # fmt: skip
@pytest.mark.parametrize("before", ["", "module.", "state_dict."])
def test_a_classifier_is_left_out_and_logged(file, name, before, caplog):
    caplog.set_level("INFO", "dinov2_attn")
    model = random(SMALL)
    state = {**model.state_dict(), name: torch.ones(3, 3)}
    torch.save({f"{before}{k}": v for k, v in state.items()}, file)
    found, left_out = built_of(file)
    part = name.partition(".")[0]
    assert left_out == (f"{before.replace('module.', '')}{part}",)
    assert f"left out {left_out[0]}" in caplog.text
    assert_attend_alike(found, model, side=6)


@pytest.mark.parametrize("name", ["norm_pre.weight", "blocks.0.attn.q_norm.weight", "rope.freqs"])
def test_what_attention_depends_on_is_not_left_out(file, name):
    torch.save({**random(SMALL).state_dict(), name: torch.ones(64)}, file)
    with pytest.raises(UnreadableFileError, match=r"unlike blocks\.0|1 left over"):
        built_of(file)


def test_a_head_that_the_model_has_is_taken(file):
    model = random(SMALL)
    model.head = nn.Linear(64, 3)
    torch.save(model.state_dict(), file)
    other = random(SMALL, 1)
    other.head = nn.Linear(64, 3)
    assert load_checkpoint(other, file) == ()
    assert_close(other.head.weight, model.head.weight)
    torch.save(random(SMALL).state_dict(), file)
    with pytest.raises(UnreadableFileError, match=r"2 missing: head\.weight, head\.bias"):
        load_checkpoint(other, file)


def test_only_a_mask_token_may_be_missing(file):
    state = without_mask(random(SMALL))
    del state["norm.bias"]
    torch.save(state, file)
    with pytest.raises(UnreadableFileError, match=r"with 1 missing: norm\.bias\.\n"):
        built_of(file)


@pytest.mark.parametrize("there", [True, False])
def test_layer_scale_on_one_side_only_is_named(file, there):
    torch.save(random(replace(SMALL, layer_scale=there)).state_dict(), file)
    advice = rf"Build the model with init_values={'1.0' if there else 'None'}"
    with pytest.raises(UnreadableFileError, match=advice):
        load_checkpoint(build_like(replace(SMALL, layer_scale=not there)), file)


# One of several


@pytest.mark.parametrize(
    ("first", "taken"),
    [("model", "model_ema"), ("state_dict", "state_dict_ema"), ("student", "teacher"),
     ("model_ema", "teacher"), ("net", "ema"), ("net", "ema_model")],
)  # fmt: skip
def test_the_order_of_preference(file, first, taken):
    one, two = random(SMALL, 0), random(SMALL, 1)
    for content in (
        {first: one.state_dict(), taken: two.state_dict()},
        {taken: two.state_dict(), first: one.state_dict()},
    ):
        torch.save(content, file)
        found, left_out = built_of(file)
        assert left_out == (first,)
        assert_attend_alike(found, two, side=6)
        found, left_out = built_of(file, key=first)
        assert left_out == (taken,)
        assert_attend_alike(found, one, side=6)
        assert load_checkpoint(random(SMALL, 2), content, key=first) == (taken,)


def test_a_key_may_be_a_part_of_the_name_or_all_of_it(file):
    one, two = random(SMALL, 0), random(SMALL, 1)
    torch.save({"model": checkpoint_files.both(two, one).state_dict(), "epoch": 3}, file)
    for key in ("student", "model.student", "model.student.backbone", "module.model.student"):
        found, _ = built_of(file, key=key)
        assert_attend_alike(found, one, side=6)


@pytest.mark.parametrize("key", ["studen", "", "model", "backbone", "epoch"])
def test_an_unknown_key_lists_the_names(file, key):
    one, two = random(SMALL, 0), random(SMALL, 1)
    torch.save({"model": checkpoint_files.both(two, one).state_dict(), "epoch": 3}, file)
    names = r"models at model\.student\.backbone, model\.teacher\.backbone"
    with pytest.raises(InvalidInputError, match=rf"named {key!r}\.\nFound {names}"):
        load_checkpoint(random(SMALL, 2), file, key=key)
