"""Relevance by vectors is the published formula on explicit matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2_attn import edit, relevance, rollout, token_similarity
from dinov2_attn.errors import InvalidInputError, NotRecordedError, OutOfRangeError
from dinov2_attn.maps import tiles
from dinov2_attn.maps.relevance import Relevance
from tests.maps.test_gradients import MODELS, Explicit, of_dinov3, of_fork, of_upstream, without_key
from tests.support import eager as textbook
from tests.support.explicit import Eager
from tests.support.recordings import assert_nothing_on
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, assert_same_bits

NEAR = {"within": 1e-10}


def weigh(output):
    """A target for each image, not linear."""
    factors = torch.arange(1, output.shape[-1] + 1, dtype=output.dtype) / output.shape[-1]
    return (output.tanh() * factors).sum(-1)


def explicit(model, images, target=weigh):
    """Weights and gradients of each layer by explicit attention, image by image."""
    each = []
    for image in images:
        with Eager() as eager:
            output = model(image[None])
        gradients = torch.autograd.grad(target(output).sum(), eager.weights)
        each.append([(a.detach()[0], g[0]) for a, g in zip(eager.weights, gradients, strict=True)])
    return each


# The published formulas, for one image and one list of (A, dA), each (heads, N, N).


def chefer(layers):
    """Transformer-MM-Explainability, Transformer_MM_explainability_ViT.ipynb."""
    relevance = torch.eye(layers[0][0].shape[-1], dtype=torch.float64)
    for weights, gradient in layers:
        cam = (gradient * weights).clamp(min=0).mean(dim=0)
        relevance = relevance + cam @ relevance
    return relevance


def gradient_rollout(layers, ratio=0.0):
    """vit_grad_rollout.py of vit-explain, with each row divided by its own sum."""
    result = torch.eye(layers[0][0].shape[-1], dtype=torch.float64)
    for weights, gradient in layers:
        fused = (weights * gradient).mean(dim=0)
        fused[fused < 0] = 0
        flat = fused.reshape(-1)
        flat[flat.topk(int(flat.numel() * ratio), largest=False).indices] = 0
        mixed = (fused + torch.eye(len(fused))) / 2
        result = (mixed / mixed.sum(dim=-1, keepdim=True)) @ result
    return result


def attention_gradient(layers):
    """Rule 5 of Chefer et al., of the last layer."""
    weights, gradient = layers[-1]
    return (gradient * weights).clamp(min=0).mean(dim=0)


FORMULAS = {
    "chefer": chefer,
    "gradient_rollout": gradient_rollout,
    "attention_gradient": attention_gradient,
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """A few rows at a time, so that every cut is made."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 300)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", FORMULAS)
def test_each_method_is_its_formula_on_explicit_attention(kind, method):
    model, images = MODELS[kind]()
    expected = torch.stack([FORMULAS[method](one) for one in explicit(model, images)])
    found = relevance(model, images, weigh, method)
    assert isinstance(found, Relevance)
    assert_close(found.weights, expected[:, :1], **NEAR)
    assert expected[:, 0].abs().max() > 1e-4
    rows = relevance(model, images, weigh, method, queries=[3, 0, -1])
    assert_close(rows.weights, expected[:, [3, 0, -1]], **NEAR)
    assert_close(relevance(model, images, weigh, method, queries=None).weights, expected, **NEAR)
    assert_nothing_on(model)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["upstream", "dinov3", "norms"])
def test_legrad_is_its_formula_on_explicit_attention(kind):
    """LeGrad: the tokens after each layer go through the rest of the model in turn."""
    model, images = MODELS[kind]()
    expected = []
    for image in images:
        maps = []
        for layer in range(3):
            tail = [block for number, block in enumerate(model.blocks) if number > layer]
            hooks = [b.register_forward_hook(lambda _, args, __: args[0]) for b in tail]
            with Eager() as eager:
                output = model(image[None])
            for hook in hooks:
                hook.remove()
            (gradient,) = torch.autograd.grad(weigh(output).sum(), [eager.weights[layer]])
            maps.append(gradient[0].clamp(min=0).mean(dim=0).mean(dim=0))
        expected.append(torch.stack(maps).mean(0))
    found = relevance(model, images, weigh, "legrad")
    assert_close(found.weights, torch.stack(expected)[:, None], **NEAR)
    assert found.queries is None
    some = relevance(model, images, weigh, "legrad", layers=[2])
    assert_close(some.weights[0, 0], maps_of_last(model, images[:1]), **NEAR)
    assert_nothing_on(model)


def maps_of_last(model, images):
    ((*_, (_, gradient)),) = explicit(model, images)
    return gradient.clamp(min=0).mean(dim=0).mean(dim=0)


@pytest.mark.parametrize("method", FORMULAS)
def test_layers_may_be_chosen(method):
    model, images = of_fork()
    each = explicit(model, images)
    for layers in ([0, 2], [1]):
        if method == "attention_gradient":
            expected = [
                sum(FORMULAS[method]([one[i]]) for i in layers) / len(layers) for one in each
            ]
        else:
            expected = [FORMULAS[method]([one[i] for i in layers]) for one in each]
        found = relevance(model, images, weigh, method, layers)
        assert_close(found.weights, torch.stack(expected)[:, :1], **NEAR)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_the_lowest_of_a_layer_may_be_discarded(ratio):
    model, images = of_fork()
    expected = [gradient_rollout(one, ratio) for one in explicit(model, images)]
    for queries, rows in (("cls", [0]), ([4, 1], [4, 1])):
        found = relevance(
            model, images, weigh, "gradient_rollout", queries=queries, discard_ratio=ratio
        )
        assert_close(found.weights, torch.stack(expected)[:, rows], **NEAR)


def vit_explain(weights, ratio, fusion):
    """vit_rollout.py of vit-explain for one image, with each row divided by its own sum."""
    result = torch.eye(weights[0].shape[-1], dtype=torch.float64)
    for attention in weights:
        fused = {"mean": attention.mean(0), "max": attention.amax(0), "min": attention.amin(0)}
        flat = fused[fusion].clone().view(-1)
        indices = flat.topk(int(flat.numel() * ratio), largest=False).indices
        flat[indices[indices != 0]] = 0
        mixed = (flat.view_as(fused[fusion]) + torch.eye(len(result))) / 2
        result = mixed / mixed.sum(dim=-1, keepdim=True) @ result
    return result


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("heads", ["mean", "max", "min"])
@pytest.mark.parametrize("models", [of_upstream, of_fork, of_dinov3])
def test_rollout_discards_as_vit_explain_does(models, heads, ratio):
    model, images = models()
    expected = [vit_explain([a for a, _ in one], ratio, heads) for one in explicit(model, images)]
    for queries, rows in (("cls", [0]), ([4, 1], [4, 1])):
        found = rollout(model, images, queries=queries, heads=heads, discard_ratio=ratio)
        assert_close(found.weights, torch.stack(expected)[:, rows], **NEAR)


@pytest.mark.parametrize("method", [*FORMULAS, "legrad"])
def test_images_of_a_batch_do_not_know_each_other(method):
    model, images = of_dinov3()
    together = relevance(model, images, weigh, method).weights
    for number, image in enumerate(images):
        assert_close(together[number], relevance(model, image[None], weigh, method).weights[0])
    batches = relevance(model, [images, images[:1]], weigh, method)
    assert_close([one.weights for one in batches], [together, together[:1]])


def test_no_matrix_is_made_where_a_vector_does():
    """The largest tensor of the whole call is smaller than one matrix of one image."""
    model, _ = of_fork()
    images = noise(1, 3, 40, 40, seed=0).double()
    length = 1 + 20 * 20
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else [out]:
                if isinstance(one, torch.Tensor):
                    sizes.append(one.numel())
            return out

    for method in ("chefer", "gradient_rollout", "attention_gradient", "legrad"):
        relevance(model, images, weigh, method)  # a first pass is proved, and its tokens probed
        sizes.clear()
        with Sizes():
            relevance(model, images, weigh, method)
        assert max(sizes) < length * length / 2, method


# Targets


class Classified(nn.Module):
    """A backbone with a head of classes."""

    def __init__(self, backbone, classes=5):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(24, classes).double()

    def forward(self, images):
        return self.head(self.backbone(images))


@pytest.fixture
def classified():
    model, images = of_fork()
    return Classified(model).eval(), images


def test_a_class_by_its_number(classified):
    model, images = classified
    expected = relevance(model, images, lambda logits: logits[:, 3])
    assert_close(relevance(model, images, 3).weights, expected.weights)
    each = relevance(model, images, torch.tensor([3, 1])).weights
    assert_close(each[0], expected.weights[0])
    assert_close(each[1:], relevance(model, images[1:], 1).weights)
    assert_close(relevance(model, images, [3, 1]).weights, each)
    for numbers in (np.array([3, 1]), [np.int64(3), 1]):
        found = relevance(model, images, numbers)
        assert_close(found.weights, each)
        assert found.target == ("class 3", "class 1")
        assert "method=chefer, target=class 3, class 1, " in repr(found)
    assert relevance(model, images, np.int64(3)).target == ("class 3",)


def test_a_class_of_a_model_that_returns_logits_by_name(classified):
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Named(Classified):
        def forward(self, images):
            return Output(super().forward(images))

    model, images = classified
    named = Named(model.backbone).eval()
    named.head = model.head
    assert_close(relevance(named, images, 2).weights, relevance(model, images, 2).weights)


@pytest.mark.parametrize("shape", [(24,), (2, 24)])
def test_an_embedding_of_text_is_compared_by_its_cosine(shape):
    model, images = of_fork()
    embedding = noise(*shape, seed=7).double()
    expected = relevance(model, images, lambda out: F.cosine_similarity(out, embedding, dim=-1))
    assert_close(relevance(model, images, embedding).weights, expected.weights)


@pytest.mark.parametrize("models", [of_fork, of_dinov3])
def test_the_similarity_of_two_tokens(models):
    model, images = models()

    def run(image):
        return model.forward_features(image)

    class Tokens(nn.Module):
        """Its output is all tokens behind the norm."""

        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, images):
            features = self.inner.forward_features(images)
            names = ("x_norm_clstoken", "x_norm_regtokens", "x_storage_tokens")
            parts = [features[name] for name in names if name in features]
            parts = [part[:, None] if part.ndim == 2 else part for part in parts]
            return torch.cat([*parts, features["x_norm_patchtokens"]], 1)

    for first, second in ((6, "cls"), (6, 3)):
        other = 0 if second == "cls" else second

        def cosine(tokens, a=first, b=other):
            return F.cosine_similarity(tokens[:, a], tokens[:, b], dim=-1)

        expected = relevance(Tokens(), images, cosine, queries=[6])
        target = token_similarity(first, second)
        assert_close(relevance(model, images, target, queries=[6]).weights, expected.weights)
        assert_close(relevance(Tokens(), images, target, queries=[6]).weights, expected.weights)
        if second == "cls":
            assert token_similarity(first) == target


def test_a_similarity_names_its_two_tokens():
    model, images = of_dinov3()
    for token, other, words in (
        (7, "cls", "patch (0, 2) and CLS"),
        (0, 10, "CLS and patch (1, 0)"),
        (-1, 3, "patch (1, 4) and register 3"),
        ((1, 4), "register:3", "patch (1, 4) and register 3"),
    ):
        found = relevance(model, images, token_similarity(token, other))
        assert found.target == (f"the similarity of {words}",)


def test_of_explicit_code_too():
    model = nn.Sequential(Explicit("plain"), Explicit("dropout")).double().eval()

    class Imaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.blocks = nn.Conv2d(3, 8, 2, 2).double(), model

        def forward(self, images):
            return self.blocks(self.patches(images).flatten(2).transpose(1, 2)).mean(1)

    images = noise(2, 3, 4, 6, seed=0).double()
    whole = Imaged()
    expected = torch.stack([chefer(one) for one in explicit(whole, images)])
    found = relevance(whole, images, weigh, queries=[0, 2])
    assert_close(found.weights, expected[:, [0, 2]], **NEAR)
    assert (found.prefix, found.grid) == (0, (2, 3))


# Around it


def test_of_an_edited_model_it_is_that_of_the_edited_weights():
    model, images = of_fork()

    def total(output):
        return weigh(output).sum()

    each = []
    for image in images:
        weights = []

        def keep(number, one, weights=weights):
            weights.append(without_key(number, one))
            return weights[-1]

        with textbook.Eager(keep):
            output = model(image[None])
        gradients = torch.autograd.grad(total(output), weights)
        each.append([(a.detach()[0], g[0]) for a, g in zip(weights, gradients, strict=True)])
    with edit(model, keys=[3]):
        for method, formula in FORMULAS.items():
            found = relevance(model, images, weigh, method, queries=[0, 4])
            expected = torch.stack([formula(one) for one in each])[:, [0, 4]]
            assert_close(found.weights, expected, **NEAR)
    assert_nothing_on(model)


def test_frozen_models_and_modes_without_gradients_do_not_matter():
    model, images = of_fork()
    expected = relevance(model, images, weigh).weights
    model.requires_grad_(False)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_same_bits(relevance(model, images.clone(), weigh).weights, expected)
    assert not expected.requires_grad
    assert not images.requires_grad


def test_the_maps_are_those_of_the_patches(tmp_path):
    pytest.importorskip("safetensors")
    model, images = of_dinov3()
    found = relevance(model, images, weigh)
    assert found.patch_maps().shape == (2, 1, 2, 5)
    assert_same_bits(found.patch_maps().flatten(2), found.weights[..., 5:])
    assert "chefer" in repr(found)
    found.save(tmp_path / "relevance.safetensors")
    assert_same_bits(Relevance.load(tmp_path / "relevance.safetensors").weights, found.weights)
    assert Relevance.load(tmp_path / "relevance.safetensors").method == "chefer"


WRONG = {
    "method": (InvalidInputError, lambda m, x: relevance(m, x, 1, "gradcam"), "'legrad'"),
    "class": (OutOfRangeError, lambda m, x: relevance(m, x, 5), "5 classes"),
    "negative": (OutOfRangeError, lambda m, x: relevance(m, x, -6), "5 classes"),
    "classes": (InvalidInputError, lambda m, x: relevance(m, x, [1, 2, 3]), "2 images"),
    "name": (InvalidInputError, lambda m, x: relevance(m, x, "cat"), "class number"),
    "bool": (InvalidInputError, lambda m, x: relevance(m, x, True), "class number"),
    "another graph": (
        NotRecordedError,
        lambda m, x: relevance(m, x, lambda out: torch.ones(len(out)).requires_grad_()),
        "none of its layers",
    ),
    "floats": (
        InvalidInputError,
        lambda m, x: relevance(m, x, np.array([3.0, 1.0])),
        "class number",
    ),
    "constant": (
        InvalidInputError,
        lambda m, x: relevance(m, x, lambda out: torch.ones(len(out))),
        "depends",
    ),
    "detached": (
        InvalidInputError,
        lambda m, x: relevance(m, x, lambda out: out.detach()[:, 0]),
        "depends",
    ),
    "number": (InvalidInputError, lambda m, x: relevance(m, x, lambda out: 3.0), "tensor"),
    "shape": (InvalidInputError, lambda m, x: relevance(m, x, lambda out: out), r"\(2, 5\)"),
    "embedding": (InvalidInputError, lambda m, x: relevance(m, x, torch.ones(7)), "5 channels"),
    "layer": (OutOfRangeError, lambda m, x: relevance(m, x, 1, layers=[7]), None),
    "query": (OutOfRangeError, lambda m, x: relevance(m, x, 1, queries=[70]), None),
    "token": (OutOfRangeError, lambda m, x: relevance(m, x, token_similarity(70)), None),
    "several tokens": (
        InvalidInputError,
        lambda m, x: relevance(m, x, token_similarity(6, "registers")),
        "register:K",
    ),
    "no register": (
        OutOfRangeError,
        lambda m, x: relevance(m, x, token_similarity(6, "register:1")),
        "without registers",
    ),
    "ratio": (
        InvalidInputError,
        lambda m, x: relevance(m, x, 1, "gradient_rollout", discard_ratio=1.5),
        "discard_ratio",
    ),
    "ratio elsewhere": (
        InvalidInputError,
        lambda m, x: relevance(m, x, 1, "chefer", discard_ratio=0.5),
        "gradient_rollout",
    ),
    "rows of legrad": (
        InvalidInputError,
        lambda m, x: relevance(m, x, 1, "legrad", queries=[1]),
        "legrad",
    ),
    "rollout's ratio": (
        InvalidInputError,
        lambda m, x: rollout(m, x, discard_ratio="much"),
        "discard_ratio",
    ),
    "no attention": (
        InvalidInputError,
        lambda m, x: relevance(nn.Sequential(nn.Conv2d(3, 5, 2)), x, 1),
        "attention",
    ),
    "NaN": (
        InvalidInputError,
        lambda m, x: relevance(m, x, lambda out: out[:, 0] * torch.nan),
        "finite",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_and_leaves_nothing(classified, case):
    model, images = classified
    error, call, words = WRONG[case]
    with pytest.raises(error, match=words):
        call(model, images)
    assert_nothing_on(model)
    assert len(relevance(model, images, 1).weights) == 2


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda out: out[:, None], r"an output of shape \(2, 1, 24\)"),
        (lambda out: {"features": out}, "Found dict"),
    ],
)
def test_what_has_no_classes_is_described(returned, said):
    class Other(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, images):
            return returned(self.inner(images))

    model, images = of_fork()
    with pytest.raises(InvalidInputError, match=said):
        relevance(Other(model), images, 1)


def test_a_target_that_misses_layers_is_said():
    """It depends on the first block alone."""
    model, images = of_fork()
    inner = []
    hook = model.blocks[0].register_forward_hook(
        lambda _, __, out: inner.append(out) if out.requires_grad else None  # no probe
    )
    with pytest.raises(NotRecordedError, match="1, 2"):
        relevance(model, images, lambda _: inner[-1][:, 0].sum(-1))
    found = relevance(model, images, lambda _: inner[-1][:, 0].sum(-1), layers=[0])
    with pytest.raises(NotRecordedError, match="one that does not depend on 2"):
        relevance(model, images, lambda _: inner[-1][:, 0].sum(-1), layers=[2])
    hook.remove()
    assert found.weights.shape == (2, 1, 7)
