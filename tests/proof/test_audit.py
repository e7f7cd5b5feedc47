"""What a copy itself returns as attention: each recipe has a verdict of its own."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinov2_attn._download import Wheel, fetch_wheel
from dinov2_attn.proof.conformance import kernel_call
from dinov2_attn.proof.verify import findings
from dinov2_attn.proof.verify.audit import audit
from dinov2_attn.proof.verify.findings import Audit, Finding
from dinov2_attn.proof.verify.recipes import RECIPES
from tests.support import upstreams
from tests.support.strategies import ModelCase, noise, randomise
from tests.support.tolerances import assert_close, assert_same_bits

CASE = ModelCase(
    depth=3, chunks=0, registers=2, heads=3, grid=(2, 3), batch=2, dtype=torch.float32, seed=1
)
TOKENS = noise(2, 9, 12, seed=3)
DINOCELL = Wheel(
    "dinocell", "0.74", "ea7dce7f8a1a35e4bf790ac7c68dbbe41c5a205927f1e6ab4a0c96306b216499"
)

# What upstream's code reads in every pass. The audit turns it on and off in this module too.
XFORMERS_AVAILABLE = False
memory_efficient_attention = None


def upstream():
    return upstreams.FIRST


def model_of(attention, copy=None):
    """A model of upstream's classes, its attention modules of the class ``attention``."""
    model = CASE.build(copy or upstream())
    for block in model.blocks:
        block.attn.__class__ = attention
    return model


def parts(module, x):
    """Query, key and value, ``(B, heads, N, head_dim)``."""
    batch, length, width = x.shape
    split = module.qkv(x).reshape(batch, length, 3, module.num_heads, width // module.num_heads)
    return split.permute(2, 0, 3, 1, 4)


def offering(recipe):
    """A class over upstream's Attention that returns what ``recipe`` makes as attention."""

    class Offering(upstream().cls("Attention")):
        def forward(self, x, return_attn=False):
            features = super().forward(x)
            if not return_attn:
                return features
            q, k, v = parts(self, x)
            logits = q @ k.mT * self.scale
            return recipe(
                q=q, k=k, v=v, x=logits.softmax(-1) @ v, logits=logits, scale=self.scale,
                features=features,
            )  # fmt: skip

    return Offering


def one(found):
    """The only finding about the keyword of the last attention module."""
    about = [f for f in found if f.where == "model.blocks[2].attn(tokens, return_attn=True)"]
    assert len(about) == 1, found
    return about[0]


RIGHT = {
    "whole": (lambda logits, **_: logits.softmax(-1), "equal to the kernel's weights "),
    "mean": (lambda logits, **_: logits.softmax(-1).mean(1), "mean over heads of the kernel's"),
    "max": (lambda logits, **_: logits.softmax(-1).amax(1), "max over heads of the kernel's"),
    "sum": (lambda logits, **_: logits.softmax(-1).sum(1), "sum over heads of the kernel's"),
    "transpose": (lambda logits, **_: logits.softmax(-1).mT, "transpose of the kernel's weights"),
    "row": (lambda logits, **_: logits.softmax(-1)[:, :, 0], "row 0 of the kernel's weights"),
    "patches": (
        lambda logits, **_: logits.softmax(-1)[:, :, 0, 1:].reshape(2, 3, 2, 3),
        "row 0 without 1 columns of the kernel's weights",
    ),
    "image": (
        lambda logits, **_: logits.softmax(-1)[0],
        "first image of the kernel's weights",
    ),
}
WRONG = {
    "logits": (lambda logits, **_: logits, "logits before softmax"),
    "unscaled logits": (lambda q, k, **_: q @ k.mT, "q kᵀ without scale, before softmax"),
    "no scale": (lambda q, k, **_: (q @ k.mT).softmax(-1), "weights without scale"),
    "scale": (
        lambda q, k, **_: (q @ k.mT * 0.3).softmax(-1),
        "weights with another scale: 0.3 in place of 0.5",
    ),
    "columns": (lambda logits, **_: logits.softmax(-2), "softmax over the queries"),
    "kernel's output": (
        lambda x, **_: x,
        r"features, not weights: the kernel's output in blocks\[2\].attn",
    ),
    "x vᵀ": (lambda x, v, **_: x @ v.mT, "x vᵀ, not weights: rows sum to −?[0-9.]+ … [0-9.]+"),
    "softmax": (lambda x, v, **_: (x @ v.mT).softmax(-1), r"softmax\(x vᵀ\), not weights$"),
    "x xᵀ": (lambda x, **_: x @ x.mT, "x xᵀ, not weights: rows sum to"),
    "q vᵀ": (lambda q, v, **_: q @ v.mT, "q vᵀ, not weights: rows sum to"),
    "k vᵀ": (lambda k, v, **_: k @ v.mT, "k vᵀ, not weights: rows sum to"),
    "k kᵀ": (
        lambda k, scale, **_: (k @ k.mT * scale).softmax(-1),
        r"softmax\(k kᵀ · scale\), not weights$",
    ),
    "mean of x vᵀ": (lambda x, v, **_: (x @ v.mT).mean(1), "mean over heads of x vᵀ, not weights"),
    "heads": (
        lambda x, v, **_: x.transpose(1, 2) @ v.transpose(1, 2).mT,
        "x vᵀ between the heads of each token, not weights",
    ),
    "none of these": (
        lambda logits, **_: logits.sin(),
        r"unknown: shape \(2, 3, 7, 7\): rows sum to −",
    ),
}


# What is equal, and what is not


@pytest.mark.parametrize("copy", upstreams.WITH_MODELS, ids=str)
def test_upstream_offers_nothing(copy):
    assert audit(CASE.build(copy), CASE.images) == []


@pytest.mark.parametrize(("recipe", "verdict"), RIGHT.values(), ids=RIGHT)
def test_weights_are_known_in_every_form(recipe, verdict):
    finding = one(audit(model_of(offering(recipe)), CASE.images))
    assert finding.is_weights
    assert finding.verdict.startswith(verdict)


@pytest.mark.parametrize(("recipe", "verdict"), WRONG.values(), ids=WRONG)
def test_a_wrong_recipe_is_named(recipe, verdict):
    finding = one(audit(model_of(offering(recipe)), CASE.images))
    assert not finding.is_weights
    assert re.match(verdict, finding.verdict), finding.verdict


def test_every_recipe_has_a_name_of_its_own():
    names = [recipe.name for recipe in RECIPES]
    assert len(set(names)) == len(names)


def test_features_are_named():
    class Asking(upstream().cls("DinoVisionTransformer")):
        def get_last_selfattention(self, x):
            return self.blocks[-1](self.prepare_tokens_with_masks(x))

    model = CASE.build(upstream())
    model.__class__ = Asking
    (finding,) = audit(model, CASE.images)[:1]
    assert finding.where == "model.get_last_selfattention(images)"
    assert finding.verdict.startswith("features, not weights: the output of blocks[2]")


# The recipe that circulates for xFormers


def in_xformers(kernel):
    """Upstream's MemEffAttention, with the recipe of facebookresearch/dinov2 issue 90."""

    class Circulating(upstream().cls("MemEffAttention")):
        def forward(self, x, attn_bias=None, return_attn=False):
            if not XFORMERS_AVAILABLE:
                return super().forward(x, attn_bias)
            if not return_attn:
                return super().forward(x, attn_bias)
            q, k, v = (part.transpose(1, 2) for part in parts(self, x))
            out = kernel()(q, k, v, attn_bias=attn_bias)
            return out.permute(0, 2, 1, 3) @ v.permute(0, 2, 3, 1)

    return Circulating


def test_the_recipe_that_circulates_is_named():
    cls = in_xformers(lambda: memory_efficient_attention)
    about = [f for f in audit(model_of(cls), CASE.images) if "return_attn=" in f.where]
    by_kernel = {finding.kernel: finding for finding in about}
    assert by_kernel["PyTorch"].verdict == "nothing new: the same as without the keyword"
    wrong = by_kernel["xFormers"]
    assert re.match("x vᵀ, not weights: rows sum to −?[0-9.]+ … [0-9.]+$", wrong.verdict)
    assert "recipe that circulates for xFormers" in wrong.note
    assert "with xFormers: x vᵀ" in str(wrong)


def test_the_recipe_is_named_where_xformers_itself_is_imported(nested):
    module = nested.module(nested.attention)

    class Circulating(nested.cls("MemEffAttention")):
        def forward(self, x, attn_bias=None, return_attn=False):
            if not (module.XFORMERS_AVAILABLE and return_attn):
                return super().forward(x, attn_bias=attn_bias)
            q, k, v = (part.transpose(1, 2) for part in parts(self, x))
            out = module.memory_efficient_attention(q, k, v, attn_bias=attn_bias)
            return out.permute(0, 2, 1, 3) @ v.permute(0, 2, 3, 1)

    found = audit(model_of(Circulating, nested), CASE.images)
    wrong = [f for f in found if f.kernel == "xFormers" and "return_attn=" in f.where]
    assert [f.verdict.partition(":")[0] for f in wrong] == ["x vᵀ, not weights"]


# Which layer, which call


def transformer(**methods):
    model = model_of(offering(lambda logits, **_: logits.softmax(-1)))
    model.__class__ = type("Asked", (type(model),), methods)
    return model


def weights_of(self, images, layers):
    x, found = self.prepare_tokens_with_masks(images), []
    for i, block in enumerate(self.blocks):
        if i in layers:
            found.append(block.attn(block.norm1(x), return_attn=True))
        x = block(x)
    return found


def about(found, method):
    return [f for f in found if f.where.startswith(f"model.{method}(")]


def test_weights_of_another_layer_are_named():
    model = transformer(get_last_self_attention=lambda self, x: weights_of(self, x, [0])[0])
    (finding,) = about(audit(model, CASE.images), "get_last_self_attention")
    assert not finding.is_weights
    assert finding.verdict.startswith("weights of another layer, blocks[0].attn")


def test_a_list_of_all_layers_is_one_finding():
    model = transformer(get_self_attention=lambda self, x: weights_of(self, x, [0, 1, 2]))
    (finding,) = about(audit(model, CASE.images), "get_self_attention")
    assert finding.is_weights
    assert finding.where.endswith("(images)[0 … 2]")
    assert finding.verdict.startswith("equal to the kernel's weights ")


def test_a_list_in_another_order_is_no_list_of_weights():
    backwards = lambda self, x: weights_of(self, x, [0, 1, 2])[::-1]  # noqa: E731
    found = about(audit(transformer(get_attentions=backwards), CASE.images), "get_attentions")
    assert [f.is_weights for f in found] == [False, True, False]


def test_a_keyword_that_changes_the_features_is_named():
    class Causal(upstream().cls("Attention")):
        def forward(self, x, return_attn=False):
            q, k, v = parts(self, x)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=return_attn)
            return self.proj(out.transpose(1, 2).flatten(2))

    found = [f for f in audit(model_of(Causal), CASE.images) if "return_attn=" in f.where]
    assert [f.verdict.partition(":")[0] for f in found] == [
        "features, not weights",
        "changes the features",
    ]
    assert found[1].verdict.endswith("another attention in blocks[2].attn")


def test_features_beside_the_weights_are_compared():
    class Both(upstream().cls("Attention")):
        def forward(self, x, return_attn=False):
            features = super().forward(x)
            q, k, _ = parts(self, x)
            weights = (q @ k.mT * self.scale).softmax(-1)
            return (features + 1, weights) if return_attn else features

    found = [f for f in audit(model_of(Both), CASE.images) if "return_attn=" in f.where]
    verdicts = {f.where.rpartition(")")[2]: f.verdict for f in found}
    assert verdicts["[1]"].startswith("equal to the kernel's weights")
    assert verdicts[""] == "changes the features: 1 apart"


def test_a_keyword_that_fails_or_does_nothing_is_named():
    def fails(self, x, masks=None, output_attentions=False):
        if output_attentions:
            raise TypeError("no such\nkeyword")
        return self.prepare_tokens_with_masks(x, masks)

    model = transformer(
        forward_tokens=fails,
        get_attention=lambda self, x: None,
        get_attention_of=lambda self, x, layer: None,
    )
    found = audit(model, CASE.images)
    (finding,) = about(found, "forward_tokens")
    assert finding.verdict == "raises TypeError: no such keyword"
    assert [f.verdict for f in about(found, "get_attention")] == ["no tensor: NoneType"]
    assert "missing 1 required positional argument" in about(found, "get_attention_of")[0].verdict


def test_dropout_in_training_is_named():
    class Dropped(upstream().cls("Attention")):
        def forward(self, x, return_attn=False):
            q, k, v = parts(self, x)
            weights = self.attn_drop((q @ k.mT * self.scale).softmax(-1))
            features = self.proj((weights @ v).transpose(1, 2).flatten(2))
            return weights if return_attn else features

    found = [f for f in audit(model_of(Dropped), CASE.images) if "return_attn=" in f.where]
    assert found[0].is_weights
    assert [f.verdict for f in found[1:]] == ["in training: weights after dropout"]


def test_tuples_and_attributes_are_seen():
    class Keeping(upstream().cls("Attention")):
        def forward(self, x):
            q, k, v = parts(self, x)
            weights = (q @ k.mT * self.scale).softmax(-1)
            self.attention_map = weights.mean(1)
            out = self.proj((weights @ v).transpose(1, 2).flatten(2))
            return out, v @ v.mT

    module = randomise(upstream().cls("Attention")(12, num_heads=3), 0)
    module.__class__ = Keeping
    holder = nn.Sequential(module)
    by_where = {f.where: f for f in audit(holder, TOKENS)}
    assert by_where["model[0](tokens)[1]"].verdict.startswith("v vᵀ, not weights: rows sum to")
    kept = by_where["model[0].attention_map after a pass"]
    assert kept.verdict.startswith("mean over heads of the kernel's weights")


# Masks, norms and rotations: timm's and transformers' own classes


def timm_attention(**options):
    timm = pytest.importorskip("timm.models.vision_transformer")
    module = randomise(timm.Attention(12, num_heads=3, qkv_bias=True, **options), 0)
    return module, timm.Attention


@pytest.mark.parametrize("fused", [False, True])
def test_timms_attention_offers_nothing(fused):
    module, _ = timm_attention()
    module.fused_attn = fused
    assert audit(module, TOKENS) == []


@pytest.mark.parametrize("fused", [False, True])
def test_weights_before_a_norm_are_named(fused):
    module, cls = timm_attention(qk_norm=True, norm_layer=nn.LayerNorm)

    class Asked(cls):
        def forward(self, x, return_attn=False):
            q, k, _ = parts(self, x)
            if return_attn:
                return (q @ k.mT * self.scale).softmax(-1)
            return super().forward(x)

    module.__class__, module.fused_attn = Asked, fused
    (finding,) = audit(module, TOKENS)
    assert finding.verdict == "weights without the norm or rotation behind the projection"


@pytest.mark.parametrize(
    ("function", "verdict"),
    [
        (lambda logits: logits.softmax(-1), "weights without the mask or bias"),
        (lambda logits: logits, "logits without the mask or bias: rows sum to"),
    ],
)
def test_what_lacks_the_mask_is_named(function, verdict):
    class Masked(upstream().cls("Attention")):
        def forward(self, x, return_attn=False):
            q, k, v = parts(self, x)
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            features = self.proj(out.transpose(1, 2).flatten(2))
            return function(q @ k.mT * self.scale) if return_attn else features

    finding = one(audit(model_of(Masked), CASE.images))
    assert finding.verdict.startswith(verdict)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_transformers_own_keyword_is_asked(kind):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=12, num_hidden_layers=3, num_attention_heads=3, image_size=8, patch_size=2,
        mlp_ratio=2, attn_implementation=kind,
    )  # fmt: skip
    model = randomise(transformers.Dinov2Model(config), 0)
    found = [f for f in audit(model, CASE.images) if f.where.startswith("model(images")]
    assert found[0].where.startswith("model(images, output_attentions=True)")
    assert found[0].is_weights == (kind == "eager")
    if kind == "sdpa":
        assert found[0].verdict == "nothing new: the same as without the keyword"


# The kernel calls themselves


KERNELS = {
    "sdpa": lambda q, k, v, s: F.scaled_dot_product_attention(q, k, v),
    "by hand": lambda q, k, v, s: (q @ k.mT * s).softmax(-1) @ v,
    "query scaled first": lambda q, k, v, s: ((q * s) @ k.mT).softmax(-1) @ v,
    "key scaled first": lambda q, k, v, s: (q @ (k * s).transpose(-2, -1)).softmax(-1) @ v,
    "divided": lambda q, k, v, s: torch.matmul(q, k.mT).div(1 / s).softmax(-1) @ v,
    "einsum": lambda q, k, v, s: torch.einsum("bhqk,bhkd->bhqd", (q @ k.mT * s).softmax(-1), v),
    "float": lambda q, k, v, s: (q @ k.mT * s).float().softmax(-1).to(q.dtype) @ v,
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_a_kernel_call_is_caught(kernel):
    class Own(upstream().cls("Attention")):
        def forward(self, x):
            q, k, v = parts(self, x)
            return kernel(q, k, v, self.scale)

    module = randomise(upstream().cls("Attention")(12, num_heads=3).double(), 0)
    module.__class__ = Own
    tokens = TOKENS.double()
    output, calls = kernel_call.caught(module, lambda: module(tokens))
    ((call,),) = calls.values()
    q, k, v = parts(module, tokens)
    assert_close(call.query @ call.key.mT * call.scale, q @ k.mT * module.scale)
    assert_close(call.weights, (q @ k.mT * module.scale).softmax(-1), dtype=torch.float32)
    assert_same_bits(call.value, v)
    assert_same_bits(call.output, output)


def test_nothing_is_left_behind():
    model = model_of(offering(lambda logits, **_: logits.softmax(-1))).train()
    before = model(CASE.images), {**globals()}
    audit(model, CASE.images)
    assert_same_bits(model(CASE.images), before[0])
    assert {**globals()} == before[1]
    for module in model.modules():
        assert module.training
        assert "forward" not in vars(module)
        assert not module._forward_hooks


def test_after_its_time_nothing_more_is_asked():
    model = model_of(offering(lambda logits, **_: logits.softmax(-1)))
    assert one(audit(model, CASE.images, seconds=0)).verdict == "not asked: the time is over"


# In processes, and in reports


def test_upstreams_wheel_offers_nothing():
    wheel = fetch_wheel(upstream().wheel)
    assert findings.audit_copy(wheel, "dinov2") == Audit()


def test_dinocell_returns_the_circulating_recipe():
    found = findings.audit_copy(fetch_wheel(DINOCELL), "dinocell.dinov2.dinov2")
    assert "has no vision transformer that can be imported" in found.trouble
    lines = [line for line in found.lines if "attention(tokens, return_attn=True)" in line]
    assert any("with xFormers: x vᵀ, not weights: rows sum to" in line for line in lines)
    assert any("with PyTorch: changes the features" in line for line in lines)


def test_an_audit_survives_its_file_and_is_said_in_lines():
    made = Audit((Finding("model(images)", "x vᵀ", "xFormers", False, "a note"),))
    assert Audit.read(made.as_json()) == made
    assert made.lines == ["model(images), with xFormers: x vᵀ (a note)"]
    twice = Audit((*made.findings, Finding("model.a(images)", "x vᵀ", note="a note")))
    assert twice.lines == [*made.lines, "model.a(images): x vᵀ"]
    assert Audit().lines == ["offers no attention of its own"]
    assert Audit(trouble="why").lines == ["not asked: why"]


def test_a_package_that_is_not_there_is_trouble(tmp_path):
    found = findings.audit_copy(tmp_path, "absent_package")
    assert "expected" in found.trouble
    assert found.findings == ()
