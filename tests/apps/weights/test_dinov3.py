"""Checkpoints of DINOv3 into its own classes: every name, buffers included, or nothing."""

from __future__ import annotations

import pytest
import torch

from dinov2_attn import load_checkpoint
from dinov2_attn.errors import UnreadableFileError
from tests.support import dinov3
from tests.support.dinov3 import IMAGES, SIZES
from tests.support.tolerances import assert_same_bits


@pytest.fixture(scope="module", params=dinov3.COPIES, ids=str)
def copy(request):
    return request.param.load()


@pytest.fixture(scope="module")
def saved(copy):
    """The weights of a model, as its own state dict has them."""
    return copy.build().state_dict()


def empty(copy, **changes):
    """A model as its class makes it, with NaN in its buffers."""
    cls = copy.module("models.vision_transformer").DinoVisionTransformer
    return cls(**{**SIZES, **changes}).eval()


FORMS = {
    "bare": lambda state: state,
    "a teacher": lambda state: {"teacher": {f"backbone.{k}": v for k, v in state.items()}},
    "a model": lambda state: {"model": state, "epoch": 3},
    "DDP": lambda state: {f"module.{k}": v for k, v in state.items()},
    "compiled": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_all_is_loaded(copy, saved, tmp_path, form):
    names = {name.rpartition(".")[2] for name in saved}
    assert {"storage_tokens", "mask_token", "periods", "bias_mask"} <= names
    torch.save(form(saved), tmp_path / "weights.pth")
    model = empty(copy)
    load_checkpoint(model, tmp_path / "weights.pth")
    assert_same_bits(model.state_dict(), dict(saved))
    assert_same_bits(model(IMAGES), copy.build()(IMAGES))


def test_a_mapping_is_loaded(copy, saved):
    model = empty(copy)
    assert load_checkpoint(model, saved) == ()
    assert_same_bits(model.state_dict(), dict(saved))


@pytest.mark.parametrize("name", ["storage_tokens", "bias_mask", "periods"])
def test_what_is_missing_is_named_and_the_model_is_unchanged(copy, saved, name):
    """A key bias without its mask would be NaN, so no buffer may be missing."""
    model = empty(copy)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UnreadableFileError, match=name):
        load_checkpoint(model, {k: v for k, v in saved.items() if not k.endswith(name)})
    assert_same_bits(model.state_dict(), before)


def test_a_mask_token_may_be_missing(copy, saved):
    """Only passes with masks use it."""
    model = empty(copy)
    load_checkpoint(model, {k: v for k, v in saved.items() if k != "mask_token"})
    assert not model.mask_token.any()


def test_another_architecture_is_refused(copy, saved):
    for changes in ({"depth": 2}, {"n_storage_tokens": 0}, {"mask_k_bias": False}):
        with pytest.raises(UnreadableFileError, match=r"left over|another shape"):
            load_checkpoint(empty(copy, **changes), saved)
