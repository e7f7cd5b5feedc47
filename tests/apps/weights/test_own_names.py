"""Checkpoints of transformers and timm in models of these libraries, by their own names."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from dinov2_attn import load_checkpoint
from dinov2_attn.errors import InvalidInputError, UnreadableFileError
from tests.maps.test_record_any_model import TRANSFORMERS, of_transformers, sharp
from tests.support.tolerances import assert_same_bits

TIMM = ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]


def of_timm(name, depth=1):
    timm = pytest.importorskip("timm", reason="the files of transformers are read")
    return sharp(timm.create_model(name, img_size=56 if "14" in name else 64, depth=depth))


def assert_same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_same_bits(ours[name], tensor)


def emptied(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_folder_by_save_pretrained_fills_the_same_model(name, tmp_path):
    model = of_transformers(name, "sdpa")
    model.save_pretrained(tmp_path)
    other = emptied(of_transformers(name, "sdpa"))
    assert load_checkpoint(other, tmp_path) == ()
    assert_same_weights(other, model)
    state = emptied(of_transformers(name, "sdpa"))
    load_checkpoint(state, {"teacher": {"backbone": model.state_dict()}})
    assert_same_weights(state, model)


def test_the_backbone_of_a_classifier_is_found(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = of_transformers("Dinov2Model", "sdpa")
    whole = sharp(transformers.Dinov2ForImageClassification(model.config))
    whole.save_pretrained(tmp_path)
    assert load_checkpoint(model, tmp_path) == ("classifier",)
    assert_same_weights(model, whole.dinov2)
    other = emptied(sharp(transformers.Dinov2ForImageClassification(model.config)))
    load_checkpoint(other, tmp_path)
    assert_same_weights(other, whole)


@pytest.mark.parametrize("name", TRANSFORMERS[:2])
def test_both_spellings_of_transformers_fill_either(name):
    model = of_transformers(name, "sdpa")
    spellings = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
    }
    state = model.state_dict()
    for pairs in (spellings.items(), [(new, old) for old, new in spellings.items()]):
        renamed = dict(state)
        for old, new in pairs:
            renamed = {key.replace(old, new): tensor for key, tensor in renamed.items()}
        other = emptied(of_transformers(name, "sdpa"))
        load_checkpoint(other, renamed)
        assert_same_weights(other, model)


def test_a_model_that_contradicts_its_file_is_an_error(tmp_path):
    model = of_transformers("Dinov2Model", "sdpa")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4}))
    with pytest.raises(InvalidInputError, match="num_heads=4"):
        load_checkpoint(model, tmp_path)
    state = dict(before)
    missing = next(name for name in state if name.endswith("norm1.weight"))
    del state[missing]
    with pytest.raises(UnreadableFileError, match=f"1 missing: {missing}"):
        load_checkpoint(model, state)
    with pytest.raises(UnreadableFileError, match=r"1 left over: other\.weight"):
        load_checkpoint(model, {**before, "other.weight": torch.zeros(1)})
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[name])


@pytest.mark.parametrize("name", TIMM)
def test_files_of_timm_fill_the_same_model(name, tmp_path):
    model = of_timm(name)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pth")
    for file in ("model.safetensors", "model.pth"):
        other = emptied(of_timm(name))
        assert load_checkpoint(other, tmp_path / file) == ()
        assert_same_weights(other, model)


@pytest.mark.parametrize("name", TIMM[:2])
def test_a_folder_that_timm_writes_for_the_hub_is_read(name, tmp_path):
    model = of_timm(name)
    hub = pytest.importorskip("timm.models._hub")
    hub.save_for_hf(model, tmp_path, model_args={"depth": 1}, safe_serialization=True)
    other = emptied(of_timm(name))
    load_checkpoint(other, tmp_path)
    assert_same_weights(other, model)
    with pytest.raises(UnreadableFileError, match="missing: blocks.1"):
        load_checkpoint(of_timm(name, depth=2), tmp_path)
