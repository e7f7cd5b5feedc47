"""A model with its attention as an ONNX file: what onnxruntime returns for it."""

from __future__ import annotations

import json
import logging
import random

import numpy as np
import pytest
import timm
import torch
import transformers
from torch import nn

import dinov2_attn
from dinov2_attn import attention_maps, export_onnx
from dinov2_attn._compat import is_compiling
from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.demo.load import load_demo_model
from dinov2_attn.apps.export import check
from dinov2_attn.apps.export.graph import tensors_of
from dinov2_attn.errors import InvalidInputError, OutOfRangeError, UnfaithfulError
from tests.support import upstreams
from tests.support.tolerances import assert_close, assert_same_bits

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'dinov2-attn[onnx]'")
onnx = pytest.importorskip("onnx", reason="pip install 'dinov2-attn[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'dinov2-attn[onnx]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own differ by version


@pytest.fixture(scope="module")
def demo():
    upstreams.FIRST.module("dinov2.models.vision_transformer")
    return load_demo_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def written(demo, folder):
    """The demo model with the attention of two layers from CLS and the patches behind it."""
    return export_onnx(demo, folder / "demo.onnx", "1,-1:#0:6", image_size=(56, 98))


def answers(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {"images": images.numpy()})
    return dict(zip(names, map(torch.from_numpy, found), strict=True))


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_file_returns_features_and_attention_for_any_batch(demo, written, batch):
    images = noise(batch, 3, 56, 98)
    found = answers(written.path, images)
    assert list(found) == ["features", "attention_1", "attention_3"] == list(written.outputs)
    maps = attention_maps(demo, images, [1, 3], queries=slice(0, 6))
    for name, weights in zip(("attention_1", "attention_3"), maps.weights, strict=True):
        assert found[name].shape == (batch, 2, 6, 1 + 4 * 7)
        assert written.outputs[name] == found[name].shape[1:]
        assert_close(found[name], weights, within=1e-4)
    assert_close(found["features"], demo(images), within=1e-4)


def test_the_metadata_say_which_token_is_which(written):
    model = onnx.load(written.path)
    facts = json.loads({p.key: p.value for p in model.metadata_props}["dinov2_attn"])
    assert facts["layers"] == {"attention_1": 1, "attention_3": 3}
    assert (facts["grid"], facts["prefix"], facts["patch_size"]) == ([4, 7], 1, [14, 14])
    assert (facts["image_size"], facts["positions"]) == ([56, 98], list(range(6)))


def test_it_says_what_was_written_and_how_exact_it_is(written):
    assert written.differences.keys() == written.outputs.keys()
    assert all(0 <= gap < 1e-3 for gap in written.differences.values())
    assert written.bytes == written.path.stat().st_size
    assert str(written).startswith("images (batch, channels, 56, 98) → features (batch, 128), att")


def test_outputs_are_named_by_keys_and_places():
    zero, one = torch.zeros(1), torch.ones(1)
    named = tensors_of({"logits": zero, "tokens": [one, (zero, None)], "loss": None})
    assert [name for name, _ in named] == ["logits", "tokens_0", "tokens_1_0"]
    assert tensors_of(zero)[0][0] == "features"
    assert [name for name, _ in tensors_of((zero, one))] == ["features_0", "features_1"]
    with pytest.raises(InvalidInputError, match="Wrap the model"):
        tensors_of({"count": 3})


def hugging_face(kind):
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        attn_implementation=kind,
    )
    return transformers.Dinov2WithRegistersModel(config).eval()


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_any_model_goes_by_its_kernel(kind, tmp_path):
    torch.manual_seed(0)
    model = hugging_face(kind)
    done = export_onnx(model, tmp_path / "a.onnx", "all:registers", heads="mean")
    images = noise(4, 3, 56, 56)
    found = answers(done.path, images)
    assert list(found) == ["last_hidden_state", "pooler_output", "attention_0", "attention_1"]
    assert list(done.layers.values()) == list(attention_maps(model, images).layers)
    maps = attention_maps(model, images, queries="registers", heads="mean")
    for name, weights in zip(("attention_0", "attention_1"), maps.weights, strict=True):
        assert weights.shape == (4, 4, 21)
        assert_close(found[name], weights, within=1e-4)


def test_half_precision_is_checked_with_its_own_tolerance(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
    done = export_onnx(model.half().eval(), tmp_path / "a.onnx", "last")
    assert done.outputs["attention_1"] == (3, 5, 5)  # a path is numbered among all of them
    assert done.layers == {"attention_1": "blocks.1.attn"}


def state_of(model):
    return [(module, dict(vars(module)), module.training) for module in model.modules()]


def test_the_model_and_all_generators_stay_as_they_were(demo, tmp_path):
    before = state_of(demo), torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    export_onnx(demo, tmp_path / "a.onnx", image_size=28, check=False)
    after = state_of(demo), torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    for (module, own, mode), (_, own_after, mode_after) in zip(before[0], after[0], strict=True):
        assert own.keys() == own_after.keys(), module
        assert all(own[name] is own_after[name] for name in own)
        assert mode == mode_after
    assert_same_bits(before[1], after[1])
    assert before[2] == after[2]
    assert_same_bits(before[3], after[3])


class Other(nn.Module):
    """A model whose graph computes something else than its code."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        features = self.inner(images)
        return features * 2 if is_compiling() else features


def test_a_graph_of_something_else_is_not_written(demo, tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"of before")
    with pytest.raises(UnfaithfulError, match="features, which differs by"):
        export_onnx(Other(demo).eval(), tmp_path / "a.onnx", image_size=28)
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
    assert (tmp_path / "a.onnx").read_bytes() == b"of before"


def run(*arguments):
    return main(["export", *map(str, arguments)])


def test_the_command_exports_the_demo_model(demo, tmp_path, capsys):
    path = tmp_path / "model.onnx"
    asked = ["--attentions=-1:cls", "--heads", "mean", "--image-size", "28", "42"]
    assert run(*asked, path, "--model", "demo") == 0
    said = capsys.readouterr().out
    assert "images (batch, channels, 28, 42) → features (batch, 128), attention_3" in said
    assert "onnxruntime differs from PyTorch by at most" in said
    assert f"wrote {path}: " in said
    assert answers(path, noise(2, 3, 28, 42))["attention_3"].shape == (2, 1, 7)


def test_a_check_that_fails_is_status_1_without_a_file(demo, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(check.TOLERANCES, torch.float32, 0.0)
    assert run(tmp_path / "model.onnx", "--model", "demo", "--image-size", 28) == 1
    assert "Expected outputs of onnxruntime within 0e+00 of PyTorch's" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name it: model.onnx"),
        (["a.onnx", "b.onnx"], "Found a.onnx, b.onnx"),
        (["a.pt", "--model", "demo"], "Try model.onnx"),
        (["a.onnx", "--model", "demo", "--arch", "vit_base"], "Leave them out: the name tells"),
        (["a.onnx", "--model", "demo", "--image-size", "30"], "Try 28 28"),
        (["a.onnx", "--model", "demo", "--attentions", "4"], "blocks between -4 and 3"),
        (
            ["a.onnx", "--model", "demo", "--attentions", "last:register:1"],
            "a model with registers",
        ),
        (["a.onnx", "--model", "demo", "--attentions", "last:registers"], "without registers"),
        (["a.onnx", "--model", "demo", "--attentions", "last:7,0"], "7, 0"),
    ],
)
def test_a_wrong_request_is_status_2(demo, arguments, message, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert message in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_wrong_argument_is_refused(demo, tmp_path):
    path = tmp_path / "a.onnx"
    with pytest.raises(InvalidInputError, match="model.eval"):
        export_onnx(load_demo_model().train(), path)
    with pytest.raises(InvalidInputError, match="model.float"):
        export_onnx(load_demo_model().bfloat16(), path)
    with pytest.raises(InvalidInputError, match="Pass the module itself"):
        export_onnx("demo", path)
    with pytest.raises(OutOfRangeError):
        export_onnx(demo, path, "7")
    with pytest.raises(InvalidInputError):
        export_onnx(demo, path, heads="max")
    with pytest.raises(dinov2_attn.Dinov2AttnError):
        export_onnx(demo, tmp_path / "no" / "file.txt")
    assert not list(tmp_path.iterdir())


def test_an_opset_that_the_exporter_does_not_write_is_refused(demo, tmp_path, caplog):
    path = tmp_path / "a.onnx"
    with pytest.raises(InvalidInputError, match="3, where it writes") as refused:
        export_onnx(demo, path, opset=3)
    assert not path.exists()
    followed = int(refused.value.hint.split("give ")[1].split()[0])
    export_onnx(demo, path, opset=followed)
    assert {one.domain: one.version for one in onnx.load(path).opset_import}[""] == followed
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert warned == [], "the exporter warns of other uses"


def test_a_model_that_cannot_be_traced_is_said(demo, tmp_path):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = demo

        def forward(self, images):
            return self.inner(images if images.sum().item() > 0 else -images)

    with pytest.raises(InvalidInputError, match=r"a model that torch\.export can trace"):
        export_onnx(Branching().eval(), tmp_path / "a.onnx", image_size=28)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_on_one_side_do_not_agree(bad):
    right, answer = torch.ones(3), np.ones(3, np.float32)
    answer[1] = bad
    with pytest.raises(UnfaithfulError, match="inf"):
        check.require_agreement({"features": check._difference(answer, right)}, 1e-4, "once")
    assert check._difference(answer, torch.from_numpy(answer)) == (0, 0)
    gap = max((0.0, 0.0), check._difference(answer, right))
    assert gap == (float("inf"), float("inf"))
