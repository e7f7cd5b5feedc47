"""Advice about gradients, facets, relevance and statistics."""

from __future__ import annotations

import torch
from torch import nn

from dinov2_attn import record, relevance, rollout, statistics, token_similarity, viz
from tests.project.advice.recordings import recorded
from tests.support.advice import Table
from tests.support.recordings import build

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


case(
    "maps",
    "Compute it from the output: lambda output: output[:, 3]",
    lambda lab: relevance(lab.model, lab.x, lambda _: lab.x.sum((1, 2, 3)).requires_grad_()),
    lambda lab: relevance(lab.model, lab.x, lambda output: output[:, 3]),
)


def made_without_autograd(lab):
    with torch.inference_mode():
        relevance(build(lab.upstream), lab.x, lambda output: output[:, 0])


case(
    "maps",
    "Build or load the model outside of it",
    made_without_autograd,
    lambda lab: relevance(lab.model, lab.x, lambda output: output[:, 0]),
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


# Features from weights


def fed(model):
    return recorded(model, lambda: model(torch.zeros(1, 3, 4)), features="from_weights")


case(
    "maps",
    'Call model.eval() first, or leave features="from_weights" out',
    lambda _: fed(nn.Sequential(Dropping())),
    lambda _: fed(nn.Sequential(Dropping()).eval()),
)
case(
    "maps",
    "Leave it out for features that are bit for bit those of an unrecorded pass",
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x), features="weights"),
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x)),
)
case(
    "maps",
    "Leave it out for that of the kernel, or pass torch.float16",
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x), dtype="half"),
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x), dtype=torch.float16),
)

case(
    "maps",
    'Leave it out for that of the kernel, or pass device="cpu"',
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x), device="gpu"),
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x), device="cpu"),
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


def statistics_of(*names, **how):
    model, tokens = nn.Sequential(Fused()), torch.zeros(1, 5, 4)
    return recorded(model, lambda: model(tokens), statistics=names, **how).statistics


PLACED = {"grid": (2, 2), "prefix": 1}

case(
    "maps",
    'Say ("entropy", "distance"), for instance',
    lambda _: statistics_of("entropies", **PLACED),
    lambda _: statistics_of("entropy", "distance", **PLACED),
)
case(
    "maps",
    "record(model, grid=(h, w), prefix=p, statistics=...)",
    lambda _: statistics_of("spread"),
    lambda _: (statistics_of("spread", **PLACED), statistics_of("entropy", "received")),
)
case(
    "maps",
    "Measure it too: name it in of=",
    lambda _: statistics_of("entropy")["distance"],
    lambda _: statistics_of("distance", **PLACED)["distance"],
)
case(
    "maps",
    'Take its entries: statistics["centroid"]',
    lambda _: statistics_of("centroid", **PLACED).by_head("centroid"),
    lambda _: statistics_of("centroid", **PLACED)["centroid"],
)
case(
    "maps",
    "pass queries=None for all tokens",
    lambda _: statistics_of("entropy").by_head("entropy"),
    lambda _: statistics_of("entropy").by_head("entropy", queries=None),
)
case(
    "maps",
    'record(model, statistics=("entropy", "distance"))',
    lambda lab: recorded(lab.model, lambda: lab.model(lab.x)).statistics,
    lambda lab: (
        recorded(lab.model, lambda: lab.model(lab.x), statistics=("entropy", "distance")).statistics
    ),
)
case(
    "maps",
    "Leave of= out for all of them",
    lambda lab: statistics(lab.model, lab.x, ()),
    lambda lab: statistics(lab.model, lab.x),
)


class Crossed(nn.Module):
    """Attention of some tokens to others."""

    num_heads = 1

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x):
        query, key, value = self.qkv(x).chunk(3, -1)
        query = query[:, :2]
        return self.proj(nn.functional.scaled_dot_product_attention(query, key, value))


def crossed(*names):
    model, tokens = nn.Sequential(Crossed()), torch.zeros(1, 5, 4)
    return recorded(model, lambda: model(tokens), statistics=names, **PLACED).statistics


case(
    "maps",
    "Leave 'distance' out for this layer",
    lambda _: crossed("distance", "spread"),
    lambda _: crossed("spread", "entropy"),
)
case(
    "maps",
    "Pass queries=None for all of these, or positions",
    lambda _: crossed("entropy").by_head("entropy"),
    lambda _: crossed("entropy").by_head("entropy", queries=None),
)


def of_two_stages():
    model, tokens = nn.Sequential(Fused(), Fused()), torch.zeros(2, 5, 4)

    def run():
        model[1](model[0](tokens)[:1])

    return recorded(model, run, statistics="entropy", **PLACED).statistics


case(
    "maps",
    "Or measure those of one stage: layers=[...]",
    lambda _: of_two_stages().by_head("entropy"),
    lambda _: (
        [one.nanmean(-1) for one in of_two_stages()["entropy"]],
        statistics_of("entropy", layers=[0], **PLACED).by_head("entropy"),
    ),
)
case(
    "apps/viz",
    "draw one of them, such as found[0]",
    lambda lab: viz.plot_statistics(statistics(lab.model, [lab.x])),
    lambda lab: viz.plot_statistics(statistics(lab.model, [lab.x])[0]),
)
case(
    "apps/viz",
    "Measure one of them, or draw viz.plot_received",
    lambda lab: viz.plot_statistics(statistics(lab.model, lab.x, "received")),
    lambda lab: (
        viz.plot_statistics(statistics(lab.model, lab.x, "entropy")),
        viz.plot_received(statistics(lab.model, lab.x, "received")),
    ),
)
case(
    "kernels",
    'Record facets=("value",), or let the model use its fused kernel',
    lambda _: facets_of("key", fused=False),
    lambda _: (facets_of("value", fused=False), facets_of("key")),
)


# Relevance


class Classified(nn.Module):
    """A backbone with a head of three classes."""

    def __init__(self, lab):
        super().__init__()
        self.backbone, self.head = lab.model, nn.Linear(8, 3).double()

    def forward(self, images):
        return self.head(self.backbone(images))


def of_class(lab, target, *args, **options):
    return relevance(Classified(lab), lab.x, target, *args, **options)


def third(output):
    return output[:, 2]


def in_lists(lab):
    """Return a model whose output is a list, which nothing but a function can take apart."""

    class Listed(Classified):
        def forward(self, images):
            return [super().forward(images)]

    return Listed(lab)


def without_norm(lab):
    """Return a model whose last norm takes CLS alone."""
    model, norm = in_lists(lab), lab.model.norm
    norm.register_forward_pre_hook(lambda _, args: (args[0][:, :1],))
    return model


def of_first_block(lab, *layers):
    inner = []
    hook = lab.model.blocks[0].register_forward_hook(lambda _, __, out: inner.append(out))
    found = relevance(lab.model, lab.x, lambda _: inner[-1][:, 0].sum(-1), "chefer", *layers)
    hook.remove()
    return found


case(
    "maps",
    'Leave it out for "chefer"',
    lambda lab: of_class(lab, 2, "gradcam"),
    lambda lab: of_class(lab, 2),
)
case(
    "maps",
    "Leave it out, or take the rollout",
    lambda lab: of_class(lab, 2, "chefer", discard_ratio=0.5),
    lambda lab: (of_class(lab, 2), of_class(lab, 2, "gradient_rollout", discard_ratio=0.5)),
)
case(
    "maps",
    "Leave queries out",
    lambda lab: of_class(lab, 2, "legrad", queries=[1]),
    lambda lab: of_class(lab, 2, "legrad"),
)
case(
    "maps",
    "Leave it out to keep all weights",
    lambda lab: rollout(lab.model, lab.x, discard_ratio=1),
    lambda lab: (rollout(lab.model, lab.x), rollout(lab.model, lab.x, discard_ratio=0.9)),
)
case(
    "maps",
    "Return one number for each image",
    lambda lab: of_class(lab, lambda output: 3),
    lambda lab: of_class(lab, lambda output: output[:, 2]),
)
case(
    "maps",
    "Select or add up in the target",
    lambda lab: of_class(lab, lambda output: output),
    lambda lab: (of_class(lab, third), of_class(lab, lambda output: output.sum(-1))),
)
case(
    "maps",
    "Compute it from the output alone",
    lambda lab: of_class(lab, lambda output: output[:, 2].detach()),
    lambda lab: of_class(lab, third),
)
case(
    "maps",
    "Pass a target that computes the similarity from the output",
    lambda lab: relevance(without_norm(lab), lab.x, token_similarity(1)),
    lambda lab: relevance(in_lists(lab), lab.x, lambda output: output[0][:, 2]),
)
case(
    "maps",
    "Compare them in a target of your own",
    lambda lab: of_class(lab, torch.ones(7)),
    lambda lab: (
        of_class(lab, lambda out: out @ torch.ones(3).to(out)),
        of_class(lab, torch.ones(3)),
    ),
)
case(
    "maps",
    "Pass a class number, or lambda output: output[:, 3]",
    lambda lab: of_class(lab, "cat"),
    lambda lab: (of_class(lab, 2), of_class(lab, third)),
)
case(
    "maps",
    "Pass one class number for all images",
    lambda lab: of_class(lab, [1, 2, 0]),
    lambda lab: (of_class(lab, 1), of_class(lab, [1, 2])),
)
case(
    "maps",
    "Pass a function of the output",
    lambda lab: relevance(in_lists(lab), lab.x, 2),
    lambda lab: relevance(in_lists(lab), lab.x, lambda output: output[0][:, 2]),
)
case(
    "maps",
    "Classes count from 0",
    lambda lab: of_class(lab, 3),
    lambda lab: (of_class(lab, 2), of_class(lab, -1)),
)
case(
    "maps",
    "Look for NaN in images and weights",
    lambda lab: of_class(lab, lambda output: output[:, 2] * torch.nan),
    lambda lab: of_class(lab, third),
)
case(
    "maps",
    "Name the layers that it depends on",
    lambda lab: of_first_block(lab),
    lambda lab: of_first_block(lab, [0]),
)
