"""Advice about gradients, facets and relevance."""

from __future__ import annotations

import torch
from torch import nn

from dinov2_attn import record
from tests.project.advice.recordings import recorded
from tests.support.advice import Table

CASES = Table()
case = CASES.add


def differentiated(lab, **options):
    """Return the recording of a pass and of its backward pass."""
    with record(lab.model, gradients=True, **options) as maps:
        output = lab.model(lab.x)
    output.sum().backward()
    return maps


def not_differentiated(lab):
    with record(lab.model, gradients=True) as maps:
        lab.model(lab.x)
    return maps


def without_grad(lab):
    with torch.no_grad():
        return recorded(lab.model, lambda: lab.model(lab.x), gradients=True)


def of_frozen(lab):
    lab.model.requires_grad_(False)
    images = lab.x.clone().requires_grad_()
    with record(lab.model, gradients=True) as maps:
        output = lab.model(images)
    output.sum().backward()
    return maps.gradients


class Dropping(nn.Module):
    """An attention module whose kernel drops weights in training."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x):
        drop = 0.5 if self.training else 0.0
        kernel = nn.functional.scaled_dot_product_attention
        return self.proj(kernel(*self.qkv(x).chunk(3, -1), dropout_p=drop))


def dropping(*, training):
    model, tokens = nn.Sequential(Dropping()).train(training), torch.zeros(1, 3, 4)
    return recorded(model, lambda: model(tokens), gradients=True)


def in_part(lab, *layers):
    """Differentiate what the first block returns."""
    inner = []
    hook = lab.model.blocks[0].register_forward_hook(lambda _, __, out: inner.append(out))
    with record(lab.model, *layers, gradients=True) as maps:
        lab.model(lab.x)
    hook.remove()
    inner[0].sum().backward()
    return maps.gradients


case(
    "maps",
    "Ask for them before the pass",
    lambda lab: lab.maps().gradients,
    lambda lab: differentiated(lab).gradients,
)
case(
    "maps",
    "Call loss.backward(), or torch.autograd.grad(loss, images)",
    lambda lab: not_differentiated(lab).gradients,
    lambda lab: differentiated(lab).gradients,
)
case("maps", "images.requires_grad_() before the pass", without_grad, of_frozen)
case(
    "maps",
    "or set the dropout of the attention to 0",
    lambda _: dropping(training=True),
    lambda _: dropping(training=False),
)
case(
    "maps",
    "Record only the layers that the target depends on",
    lambda lab: in_part(lab),
    lambda lab: in_part(lab, [0]),
)


# Facets


class Fused(nn.Module):
    """Attention by a fused kernel, or by explicit code."""

    def __init__(self, *, fused=True):
        super().__init__()
        self.qkv, self.proj, self.fused = nn.Linear(4, 12), nn.Linear(4, 4), fused

    def forward(self, x):
        query, key, value = self.qkv(x).chunk(3, -1)
        if self.fused:
            return self.proj(nn.functional.scaled_dot_product_attention(query, key, value))
        return self.proj((-torch.cdist(query, key)).softmax(-1) @ value)


def facets_of(*facets, fused=True):
    model, tokens = nn.Sequential(Fused(fused=fused)), torch.zeros(1, 3, 4)
    return recorded(model, lambda: model(tokens), facets=facets)


case(
    "maps",
    'Say facets=("key",)',
    lambda _: facets_of("keys"),
    lambda _: facets_of("key").facet("key"),
)
case(
    "maps",
    'record(model, facets=("query", "key", "value"))',
    lambda _: facets_of("key").facet("value"),
    lambda _: facets_of("query", "key", "value").facet("value"),
)
case(
    "kernels",
    'Record facets=("value",), or let the model use its fused kernel',
    lambda _: facets_of("key", fused=False),
    lambda _: (facets_of("value", fused=False), facets_of("key")),
)
