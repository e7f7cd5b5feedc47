"""Other libraries' models, by these libraries: the attention of each, from its own files."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import dinov2_attn
from dinov2_attn.apps.cli.main import main
from dinov2_attn.apps.weights.architecture import infer
from dinov2_attn.apps.weights.checkpoints import fill, load_checkpoint
from dinov2_attn.apps.weights.models import build_like
from dinov2_attn.apps.weights.reading import read
from dinov2_attn.errors import InvalidInputError, UnreadableFileError
from tests.support import upstreams
from tests.support.bright_patch import photograph_of
from tests.support.strategies import noise
from tests.support.tolerances import assert_close

transformers = pytest.importorskip("transformers", reason="it makes the files that are read here")
timm = pytest.importorskip("timm", reason="it makes the files that are read here")
if not transformers.utils.is_torch_available():
    # It supports newer versions only; the files of DINO itself are read by test_checkpoints.
    pytest.skip(f"this transformers takes no torch {torch.__version__}", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

SMALL = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 7}
IMAGES = noise(2, 3, 28, 28, seed=5)


@pytest.fixture(scope="module", autouse=True)
def _grafted():
    with dinov2_attn.install(upstreams.FIRST.package):
        yield


@pytest.fixture
def fork_with_registers(monkeypatch):
    """A fork with registers in the place of upstream's first revision, grafted."""
    fork = upstreams.DEPTH_ANYTHING
    with dinov2_attn.install(fork.package):
        code = fork.module("depth_anything_v2.dinov2")
        upstreams.FIRST.module(upstreams.FIRST.model)
        monkeypatch.setattr(sys.modules["dinov2.models"], "vision_transformer", code)
        yield


def sharp(model):
    """Fill every parameter with numbers whose attention is far from uniform."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or "lambda" in name or "gamma" in name:
                parameter.copy_(1 + drawn / 4)
            elif parameter.ndim == 2 and "token" not in name:
                parameter.copy_(drawn * 2 / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(drawn / 3)
    return model.eval()


def of_transformers(name, **options):
    config = getattr(transformers, f"{name}Config")(**{**SMALL, "image_size": 28, **options})
    config._attn_implementation = "eager"
    return config


def attentions_of(model, images=IMAGES):
    with torch.no_grad():
        return model(images, output_attentions=True).attentions


def of_timm(model, images=IMAGES):
    """Return what each block's dropout of attention is given."""
    seen = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model.eval()(images)
    return seen


def assert_attends_alike(path, theirs, images=IMAGES, heads=None, **options):
    """Build what the file says, fill it, and compare each layer with the library's own."""
    checkpoint = read(path)
    model = build_like(infer(checkpoint, heads, **options))
    left_out = fill(model, checkpoint, **options)
    again = build_like(infer(checkpoint, heads, **options))
    assert load_checkpoint(again, path, **options) == left_out
    with torch.no_grad():
        ours = model.get_self_attention(images, n=len(theirs))
        twice = again.get_self_attention(images, n=len(theirs))
    for mine, same, weights in zip(ours, twice, theirs, strict=True):
        assert weights.amax(-1).mean() > 2 / weights.shape[-1], "not sharp"
        assert_close(mine, weights)
        assert_close(same, weights)
    return left_out


# transformers


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dinov2_of_transformers(tmp_path, swiglu, bias):
    config = of_transformers("Dinov2", use_swiglu_ffn=swiglu, qkv_bias=bias)
    model = sharp(transformers.Dinov2Model(config))
    model.save_pretrained(tmp_path)
    theirs = attentions_of(model)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert assert_attends_alike(path, theirs) == ()
    torch.save(model.state_dict(), tmp_path / "memory.pth")  # by the names that are not saved
    assert_attends_alike(tmp_path / "memory.pth", theirs)


def test_registers_of_transformers(tmp_path, fork_with_registers):
    model = sharp(transformers.Dinov2WithRegistersModel(of_transformers("Dinov2WithRegisters")))
    model.save_pretrained(tmp_path)
    assert_attends_alike(tmp_path, attentions_of(model))
    other = noise(1, 3, 21, 42, seed=2)
    assert_attends_alike(tmp_path, attentions_of(model, other), other)


def test_positions_of_other_sizes_are_interpolated_as_in_transformers(
    tmp_path, fork_with_registers
):
    """It interpolates to a size, and upstream's published models without registers by a factor."""
    model = sharp(transformers.Dinov2Model(of_transformers("Dinov2")))
    model.save_pretrained(tmp_path)
    other = noise(1, 3, 35, 42, seed=2)
    assert_attends_alike(tmp_path, attentions_of(model, other), other)


def test_a_classifier_in_parts(tmp_path):
    config = of_transformers("Dinov2", num_labels=3)
    model = sharp(transformers.Dinov2ForImageClassification(config))
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    theirs = attentions_of(model)
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert assert_attends_alike(path, theirs) == ("classifier",)
    part = min(tmp_path.glob("model-*.safetensors"))
    with pytest.raises(
        UnreadableFileError, match=rf"(?s)one of its parts\.\nName the folder.*{tmp_path}"
    ):
        read(part)
    part.unlink()
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        with pytest.raises(UnreadableFileError, match=rf"no {part.name}\.\nDownload the parts"):
            read(path)


def older(state):
    """By the names of transformers 4, which the files on the hub have."""
    names = {
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
    }
    renamed = {}
    for name, tensor in state.items():
        for new, old in names.items():
            name = name.replace(new, old)  # noqa: PLW2901
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("names", [dict, older])
def test_a_pickle_of_transformers(tmp_path, names):
    model = sharp(transformers.Dinov2ForImageClassification(of_transformers("Dinov2")))
    torch.save(names(model.state_dict()), tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    theirs = attentions_of(model)
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        assert assert_attends_alike(path, theirs) == ("classifier",)


def test_swiglu_by_its_older_names(tmp_path):
    model = sharp(transformers.Dinov2Model(of_transformers("Dinov2", use_swiglu_ffn=True)))
    state = older(model.state_dict())
    for i in range(2):
        start = f"encoder.layer.{i}.mlp."
        for leaf in ("weight", "bias"):
            halves = [state.pop(f"{start}{half}_proj.{leaf}") for half in ("gate", "up")]
            state[f"{start}weights_in.{leaf}"] = torch.cat(halves)
            state[f"{start}weights_out.{leaf}"] = state.pop(f"{start}down_proj.{leaf}")
    torch.save(state, tmp_path / "w.bin")
    assert_attends_alike(tmp_path / "w.bin", attentions_of(model), heads=4)


def test_dino_v1_of_transformers(tmp_path):
    """A ViT, with no LayerScale, and norms with an epsilon of its own."""
    model = sharp(transformers.ViTModel(of_transformers("ViT", layer_norm_eps=1e-2)))
    model.save_pretrained(tmp_path)
    assert assert_attends_alike(tmp_path, attentions_of(model)) == ("pooler",)
    found = build_like(infer(read(tmp_path)))
    found.norm.eps = 1e-6
    with pytest.raises(
        InvalidInputError, match=r"(?s)eps=0\.01, as .*config\.json says\.\nFound 1e-06, 0"
    ):
        load_checkpoint(found, tmp_path)


def test_a_model_of_other_heads_than_the_config_states_is_refused(tmp_path):
    model = transformers.Dinov2Model(of_transformers("Dinov2"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    other = build_like(infer(read(tmp_path)))
    other.num_heads = 2
    with pytest.raises(
        InvalidInputError, match=r"(?s)num_heads=4, as .*config\.json.*Found num_heads=2"
    ):
        load_checkpoint(other, tmp_path)
    with pytest.raises(
        InvalidInputError, match=r"(?s)3 heads, as requested\.\nFound .*config\.json with 4"
    ):
        infer(read(tmp_path), 3)
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(UnreadableFileError, match=r"(?s)with GELU.*config\.json with 'relu'"):
        infer(read(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": "x"}))
    with pytest.raises(
        UnreadableFileError, match=r"(?s)above 0 as num_attention_heads\.\nFound .* with 'x'"
    ):
        read(tmp_path)


def test_a_config_of_another_model_is_not_used(tmp_path):
    transformers.Dinov2Model(of_transformers("Dinov2")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(
        InvalidInputError, match="the number of heads, which weights do not contain"
    ):
        infer(read(tmp_path))


def test_dinov3_is_named(tmp_path):
    config = of_transformers("DINOv3ViT", num_register_tokens=4)
    transformers.DINOv3ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(UnreadableFileError, match="a DINOv3 checkpoint"):
        infer(read(tmp_path))
    metas = {"rope_embed.periods": torch.ones(4), "storage_tokens": torch.ones(1, 4, 8)}
    torch.save({**metas, "cls_token": torch.ones(1, 1, 8)}, tmp_path / "w.pth")
    with pytest.raises(UnreadableFileError, match="a DINOv3 checkpoint"):
        infer(read(tmp_path / "w.pth"))


def test_the_command_line_draws_a_folder(tmp_path):
    model = sharp(transformers.Dinov2Model(of_transformers("Dinov2", image_size=21)))
    model.save_pretrained(tmp_path / "hf")
    Image.fromarray(photograph_of((3, 3), (1, 1), patch_size=7)).save(tmp_path / "photo.png")
    arguments = ["heatmap", tmp_path / "photo.png", "-o", tmp_path / "out"]
    assert main([*map(str, arguments), "--weights", str(tmp_path / "hf")]) == 0
    from dinov2_attn.apps.viz.images import load_image

    image = load_image(tmp_path / "photo.png", 7).tensor[None]
    theirs = attentions_of(model, image)[-1][0, :, 0, 1:].reshape(4, 3, 3)
    assert_close(torch.from_numpy(np.load(tmp_path / "out" / "attention.npy")), theirs)


def test_a_name_of_the_hub(tmp_path, monkeypatch):
    """From its cache, offline; what is not there is not downloaded, and the command is named."""
    hub = pytest.importorskip("huggingface_hub", reason="it has the cache that is looked at")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    message = r"(?s)some/model, which is neither a path.*`pip install huggingface_hub` and `hf d"
    with pytest.raises(UnreadableFileError, match=message):
        read("some/model")
    model = sharp(transformers.Dinov2Model(of_transformers("Dinov2")))
    cache = tmp_path / "models--some--model"
    model.save_pretrained(cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    assert_attends_alike("some/model", attentions_of(model))


# timm


def timm_model(name, **options):
    sizes = {"img_size": 28, "patch_size": 7, "depth": 2, "embed_dim": 96, "num_heads": 4}
    return sharp(timm.create_model(name, pretrained=False, **{**sizes, **options}))


def test_dinov2_of_timm(tmp_path):
    model = timm_model("vit_small_patch14_dinov2")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    assert assert_attends_alike(tmp_path / "w.pth", of_timm(model), heads=4) == ()


@pytest.mark.parametrize("no_embed_class", [False, True])
def test_registers_of_timm(tmp_path, fork_with_registers, no_embed_class):
    model = timm_model(
        "vit_small_patch14_reg4_dinov2", no_embed_class=no_embed_class, num_classes=5
    )
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    left_out = assert_attends_alike(tmp_path / "w.pth", of_timm(model), heads=4)
    assert left_out == ("state_dict.head",)


def test_swiglu_of_timm(tmp_path, fork_with_registers):
    model = timm_model("vit_giant_patch14_reg4_dinov2", mlp_ratio=4)
    timm.models.save_for_hf(model, tmp_path / "hf", model_args={"num_heads": 4})
    assert_attends_alike(tmp_path / "hf", of_timm(model))
    from timm.layers import SwiGLU

    model = timm_model("vit_small_patch14_dinov2", mlp_layer=SwiGLU, act_layer=torch.nn.SiLU)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    assert_attends_alike(tmp_path / "w.pth", of_timm(model), heads=4)


def test_positions_without_cls_of_timm(tmp_path):
    model = timm_model("vit_small_patch16_224", no_embed_class=True, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    assert_attends_alike(tmp_path / "w.pth", of_timm(model), heads=4)


def test_heads_by_the_names_of_timm():
    from dinov2_attn.apps.weights.config_files import _TIMM

    for name, facts in _TIMM.items():
        named = {"vit_giant2": "vit_giant_patch14_dinov2"}.get(name, name)
        full = (
            next(found for found in timm.list_models("vit_*") if found.startswith(f"{named}_patch"))
            if "patch" not in named
            else named
        )
        with torch.device("meta"):
            model = timm.create_model(full)
        assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == facts


# One of several, and what a mapping holds


def test_a_mapping_is_taken_in_place_of_a_file(tmp_path):
    model = sharp(transformers.Dinov2Model(of_transformers("Dinov2")))
    model.save_pretrained(tmp_path)
    ours, filled = (build_like(infer(read(tmp_path))) for _ in range(2))
    load_checkpoint(ours, tmp_path)
    assert load_checkpoint(filled, {"net": model.state_dict(), "epoch": 3}) == ("epoch",)
    for mine, theirs in zip(filled.parameters(), ours.parameters(), strict=True):
        assert_close(mine, theirs)
    with pytest.raises(InvalidInputError, match=r"a path or a mapping\.\nFound a module"):
        load_checkpoint(filled, model)
    with pytest.raises(InvalidInputError, match=r"(?s)names to tensors.*Found an empty dict"):
        load_checkpoint(filled, {})


def test_tensors_of_shared_memory_are_not_joined(tmp_path):
    """Or a small file could take any memory."""
    model = transformers.Dinov2Model(of_transformers("Dinov2"))
    state = {name: torch.ones(1).expand(t.shape) for name, t in model.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UnreadableFileError, match="share their memory"):
        infer(read(tmp_path / "w.pth"))


def test_an_index_names_no_file_outside_its_folder(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for name in ("../w.safetensors", "/w", "..", ""):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UnreadableFileError, match="which names no files"):
            read(index)
    shutil.rmtree(tmp_path)
