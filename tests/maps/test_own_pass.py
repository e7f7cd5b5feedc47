"""Rollout, artifact tokens, pages and files of a model that has to run its own pass: DINOv3."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import dinov2_attn
from dinov2_attn import artifact_tokens, attention_maps, extract, rollout, viz
from dinov2_attn.apps.extraction.read import AttentionDataset
from dinov2_attn.errors import InvalidInputError
from tests.support import dinov3
from tests.support.dinov3 import IMAGES, PREFIX, Truth
from tests.support.tolerances import assert_close

NEAR = {"within": 1e-6}


@pytest.fixture(scope="module", params=dinov3.COPIES, ids=str)
def model(request):
    copy = request.param.load()
    with dinov2_attn.install(copy.package):
        yield copy.build()


@pytest.fixture(scope="module")
def truth(model):
    with Truth() as found, torch.no_grad():
        model.forward_features(IMAGES)
    return found.weights


def rolled(matrices):
    """The textbook's product of (A + 1) / 2 of each layer."""
    result = torch.eye(matrices[0].shape[-1], dtype=torch.float64).expand(len(matrices[0]), -1, -1)
    for matrix in matrices:
        result = (matrix.mean(1) + torch.eye(matrix.shape[-1])) / 2 @ result
    return result


def test_a_rollout_is_the_product_of_the_kernels_weights(model, truth):
    assert_close(rollout(model, IMAGES).weights, rolled(truth)[:, :1], **NEAR)
    found = rollout(model, IMAGES, layers=[0, 1], queries=[7, 2]).weights
    assert_close(found, rolled(truth[:2])[:, [7, 2]], **NEAR)


def test_artifact_tokens_see_the_blocks_and_the_last_kernel(model, truth):
    seen = []
    hook = model.blocks[1].register_forward_hook(lambda _, __, out: seen.append(out[0]))
    model.forward_features(IMAGES)
    hook.remove()
    found = artifact_tokens(model, IMAGES, layer=1)
    assert_close(found.norms.flatten(1), seen[0][:, PREFIX:].norm(dim=-1))
    received = truth[-1].mean(1)
    assert_close(found.from_cls.flatten(1), received[:, 0, PREFIX:], **NEAR)
    assert_close(found.from_all.flatten(1), received.mean(1)[:, PREFIX:], **NEAR)
    assert not any(block._forward_hooks for block in model.blocks)


def test_stochastic_depth_is_refused_until_eval(model):
    model.train()
    try:
        for block in model.blocks:
            block.sample_drop_ratio = 0.4
        with pytest.raises(InvalidInputError, match="eval"):
            rollout(model, IMAGES)
    finally:
        for block in model.eval().blocks:
            block.sample_drop_ratio = 0.0
    assert rollout(model, IMAGES).weights.isfinite().all()


@pytest.fixture
def photograph(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photograph.png")
    return tmp_path / "photograph.png"


def test_a_page_is_written(model, photograph, tmp_path):
    page = viz.explore(model, viz.load_image(photograph, model), tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 10_000
    assert "layers 0–2" in repr(page)


@pytest.mark.parametrize("artifacts", [False, True])
def test_extracted_maps_are_those_of_the_model(model, photograph, tmp_path, artifacts):
    extract(model, [photograph], tmp_path / "out", layers=3, artifacts=artifacts)
    image = viz.load_image(photograph, model).tensor[None]
    expected = attention_maps(model, image, queries="cls").patch_maps()
    found = torch.as_tensor(np.asarray(AttentionDataset(tmp_path / "out")[0]["maps"]))
    assert_close(found.squeeze(), torch.stack(expected, 1).squeeze(), within=1e-5)


def test_a_causal_kernel_is_rolled_out_with_its_mask(model):
    """What goes through queries and keys alone would leave the mask out."""
    attention = type(model.blocks[1].attn)

    class Causal(attention):
        def compute_attention(self, qkv, attn_bias=None, rope=None):
            query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            call = torch.nn.functional.scaled_dot_product_attention
            return call(query, key, value, is_causal=True).transpose(1, 2).flatten(2)

    model.blocks[1].attn.__class__ = Causal
    try:
        weights = model.get_self_attention(IMAGES)
        assert not weights[1].triu(1).any()
        one = torch.eye(weights[0].shape[-1], dtype=weights[0].dtype)
        product = one
        for layer in weights:
            product = (0.5 * one + 0.5 * layer.mean(1)) @ product
        assert_close(rollout(model, IMAGES).weights, product[:, :1], **NEAR)
    finally:
        model.blocks[1].attn.__class__ = attention
