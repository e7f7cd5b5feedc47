"""Where a backbone is found among tensors, and by which names: no file and no model is needed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinov2_attn.apps.weights.layouts import ANCHORS, find_backbone
from dinov2_attn.apps.weights.reading import Checkpoint
from dinov2_attn.errors import UnreadableFileError

NAMES = (*ANCHORS, "norm.bias", "blocks.0.norm1.weight", "blocks.1.norm1.weight")

# Parts of names that are no wrapper's, no head's, and not the one that is preferred.
parts = st.sampled_from(["model", "backbone", "ema", "net", "teacher_net", "viTX"])
roots = st.lists(parts, max_size=3).map(lambda found: "".join(f"{part}." for part in found))


def model_below(root, names=NAMES):
    return {f"{root}{name}": torch.ones(1) for name in names}


def found_in(tensors, others=(), names=NAMES):
    return find_backbone(Checkpoint("x.pth", tensors, others), names)


@given(root=roots)
def test_a_model_is_found_below_any_name(root):
    tensors = model_below(root)
    backbone = found_in(tensors)
    assert backbone.root == root.removesuffix(".")
    assert {f"{root}{key}": tensor for key, tensor in backbone.weights.items()} == tensors
    assert backbone.left_out == ()


@given(before=roots, after=roots, other=roots)
def test_the_teacher_is_chosen_among_others(before, after, other):
    """Even one with less of a model than the student: what it lacks is then an error."""
    root = f"{before}teacher.{after}"
    kept = model_below(root, NAMES[1:])
    backbone = found_in({**model_below(f"student.{other}"), **kept, "unrelated": torch.ones(1)})
    assert backbone.root == root.removesuffix(".")
    assert {f"{root}{key}": tensor for key, tensor in backbone.weights.items()} == kept


def test_the_teacher_with_more_parameters_is_chosen():
    tensors = {**model_below("a.teacher.", ANCHORS[:1]), **model_below("b.teacher.", ANCHORS[:2])}
    assert found_in(tensors).root == "b.teacher"
    assert found_in(dict(reversed(tensors.items()))).root == "b.teacher"


def test_a_name_that_only_ends_like_a_parameter_is_ignored():
    backbone = found_in({**model_below("net."), "my_cls_token": torch.ones(1)})
    assert (backbone.root, backbone.left_out) == ("net", ("my_cls_token",))


def test_a_model_without_upstreams_names_is_found_by_its_own():
    tensors = model_below("head.", ["weight", "bias"])
    backbone = found_in(tensors, names=["weight", "bias"])
    assert backbone.root == "head"
    assert set(backbone.weights) == {"weight", "bias"}


def test_a_model_with_some_of_upstreams_names_is_found_by_these():
    """What else it has may stand elsewhere too, as often as it likes."""
    names = ["pos_embed", "norm.bias"]
    tensors = {**model_below("net.", names), "a.norm.bias": torch.ones(1)}
    assert found_in(tensors, names=names).root == "net"
    assert found_in({**tensors, "norm.bias": torch.ones(1)}, names=names).root == "net"


def test_without_a_model_all_tensors_are_taken():
    backbone = found_in({"some.thing": torch.ones(1)})
    assert (backbone.root, set(backbone.weights), backbone.left_out) == ("", {"some.thing"}, ())


def test_two_equal_models_are_named():
    tensors = {**model_below(""), **model_below("a.b."), **model_below("c.", ANCHORS[:2])}
    with pytest.raises(
        UnreadableFileError, match=r"x\.pth with one in each of , a\.b\.\nChoose one: --key a\.b"
    ):
        found_in(tensors)


def test_wrappers_of_a_parameter_do_not_make_a_second_model():
    """Two names of one tensor are the same error wherever they stand: here that of an anchor."""
    tensors = {**model_below("net."), "module.net.cls_token": torch.ones(1)}
    tensors["net.module.cls_token"] = torch.ones(1)
    message = (
        r"x\.pth with net\.cls_token and module\.net\.cls_token and net\.module\.cls_token, which"
    )
    with pytest.raises(UnreadableFileError, match=message):
        found_in(tensors)


def test_parts_that_are_left_out_are_named_once_and_shortly():
    tensors = {
        **model_below("model.teacher.backbone."),
        **model_below("model.student.backbone."),
        "model.teacher.dino_head.mlp.0.weight": torch.ones(1),
        "model.teacher.dino_head.mlp.0.bias": torch.ones(1),
        "model.teacher.backbone.ibot_head.mlp.weight": torch.ones(1),
        "model.teacher.backbones": torch.ones(1),
        "ema.teacher.backbone": torch.ones(1),
    }
    backbone = found_in(
        tensors, others=("module.epoch", "model", "optimizer.state", "optimizer.lr")
    )
    assert backbone.root == "model.teacher.backbone"
    assert set(backbone.weights) == set(NAMES)
    assert backbone.left_out == (
        "epoch",
        "model",
        "optimizer",
        "model.student",
        "model.teacher.dino_head",
        "model.teacher.backbone.ibot_head",
        "model.teacher.backbones",
        "ema",
    )


def test_a_head_is_loaded_if_the_model_has_one_of_its_name():
    names = [*NAMES, "dino_head.weight"]
    tensors = {**model_below("", names), "dino_head.bias": torch.ones(1)}
    backbone = found_in(tensors, names=names)
    assert set(backbone.weights) == set(names)
    assert backbone.left_out == ("dino_head",)
