"""How faithful maps are on the demo model: patches are removed and inserted in their order.

``python -m dinov2_attn.apps.demo.faithfulness`` prints the table of the model card. What is
explained is the probability that a scene has a target, by a linear classifier on the CLS features.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dinov2_attn
from dinov2_attn.apps.demo.game import to_tensor
from dinov2_attn.apps.demo.load import load_demo_model
from dinov2_attn.apps.demo.scenes import PATCH, Scene, draw
from dinov2_attn.apps.weights.source import obtain
from dinov2_attn.maps.relevance import relevance
from dinov2_attn.maps.rollout import rollout

GRID = (7, 9)
SCENES = 100
FIRST = 10  # scenes whose numbers a test computes again
# Scenes of other seeds than those of the training: for the classifier, and for the table.
FIRST_FITTED, FITTED = 100_000, 600
FIRST_SHOWN = 200_000
BATCH = 50
RIDGE = 1e-2  # of the classifier's weights, for features of unit variance
STEPS = 20  # of Newton's method

# A map (h, w) of each image, whose highest patches are the most important ones.
Maps = Callable[[nn.Sequential, Tensor], Tensor]


def classifier_on(model: nn.Module) -> nn.Sequential:
    """Return ``model`` with a logistic regression that says whether the target is in a scene.

    Half of its scenes have the target. In the others one more distractor stands in its place.
    """
    scenes = [draw(FIRST_FITTED + i, GRID, target=i % 2 == 0) for i in range(FITTED)]
    features = _features(model, scenes)
    wanted = torch.tensor([i % 2 == 0 for i in range(FITTED)], dtype=torch.float64)
    linear = nn.Linear(features.shape[1], 1)
    weight, bias = _logistic_regression(features, wanted)
    linear.load_state_dict({"weight": weight[None].float(), "bias": bias[None].float()})
    return nn.Sequential(model, linear).eval().requires_grad_(False)


def accuracy(classifier: nn.Sequential, count: int = 2 * SCENES) -> float:
    """Return how often ``classifier`` is right on scenes that it was not fitted to."""
    scenes = [draw(FIRST_SHOWN + i, GRID, target=i % 2 == 0) for i in range(count)]
    found = torch.cat([classifier(to_tensor(part))[:, 0] > 0 for part in _batches(scenes)])
    return float(np.mean([bool(one) == (i % 2 == 0) for i, one in enumerate(found)]))


def _features(model: nn.Module, scenes: list[Scene]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(to_tensor(part)) for part in _batches(scenes)]).double()


def _batches(scenes: list[Scene]) -> list[list[Scene]]:
    return [scenes[i : i + BATCH] for i in range(0, len(scenes), BATCH)]


def _logistic_regression(features: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias, by Newton's method in float64."""
    mean, std = features.mean(0), features.std(0)
    inputs = torch.cat([(features - mean) / std, torch.ones(len(features), 1)], 1).double()
    ridge = RIDGE * len(features) * torch.eye(inputs.shape[1], dtype=torch.float64)
    ridge[-1, -1] = 0
    weight = torch.zeros(inputs.shape[1], dtype=torch.float64)
    for _ in range(STEPS):
        found = (inputs @ weight).sigmoid()
        slope = inputs.T @ (found - wanted) + ridge @ weight
        curve = (inputs * (found * (1 - found))[:, None]).T @ inputs + ridge
        weight = weight - torch.linalg.solve(curve, slope)
    scaled = weight[:-1] / std
    return scaled, weight[-1] - scaled @ mean


def logit(output: Tensor) -> Tensor:
    """Return the target that is explained."""
    return output[:, 0]


def _by(method: Any) -> Maps:
    return lambda model, images: relevance(model, images, logit, method).patch_maps()[:, 0]


def _last_layer(model: nn.Sequential, images: Tensor) -> Tensor:
    maps = dinov2_attn.attention_maps(model[0], images, 1, queries="cls", heads="mean")
    return maps.patch_maps()[-1][:, 0]


def _random(_: nn.Module, images: Tensor) -> Tensor:
    numbers = torch.Generator().manual_seed(0)
    return torch.rand(len(images), *GRID, generator=numbers)


METHODS: dict[str, Maps] = {
    "attention of CLS, last layer": _last_layer,
    "rollout": lambda model, images: rollout(model[0], images).patch_maps()[:, 0],
    "attention_gradient": _by("attention_gradient"),
    "gradient_rollout": _by("gradient_rollout"),
    "chefer": _by("chefer"),
    "legrad": _by("legrad"),
    "random order": _random,
}


def areas(classifier: nn.Sequential, maps: Maps, scenes: list[Scene]) -> Tensor:
    """Return the areas under the curves of deletion and of insertion, ``(scenes, 2)``.

    A curve is the probability of the target after 0, 1, … all patches. A patch that is removed has
    the mean colour of its scene. Deletion removes the highest patches first, insertion puts them
    first into a scene without any.
    """
    found = []
    for part in _batches(scenes):
        images = to_tensor(part)
        order = maps(classifier, images).flatten(1).argsort(dim=1, descending=True, stable=True)
        found += [_areas_of_one(classifier, *one) for one in zip(images, order, strict=True)]
    return torch.tensor(found, dtype=torch.float64)


def _areas_of_one(classifier: nn.Sequential, image: Tensor, order: Tensor) -> list[float]:
    plain = image.mean((1, 2), keepdim=True).expand_as(image)
    count = len(order)
    ranks = torch.empty(count, dtype=torch.long)
    ranks[order] = torch.arange(count)
    # Row k: which patches are among the k highest.
    highest = ranks[None] < torch.arange(count + 1)[:, None]
    masks = highest.view(-1, 1, *GRID).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    with torch.no_grad():
        deleted = classifier(torch.where(masks, plain, image))[:, 0].double().sigmoid()
        inserted = classifier(torch.where(masks, image, plain))[:, 0].double().sigmoid()
    return [float(torch.trapezoid(curve) / count) for curve in (deleted, inserted)]


def shown(count: int = SCENES) -> list[Scene]:
    """Return the scenes of the table, which have a target each."""
    return [draw(FIRST_SHOWN + i, GRID) for i in range(count)]


def table(classifier: nn.Sequential, scenes: list[Scene]) -> list[str]:
    """Return a Markdown table: mean ± standard deviation over ``scenes``, and of the first ones."""
    lines = [
        f"| order of patches | deletion | insertion | the first {FIRST} scenes |",
        "|---|---|---|---|",
    ]
    return lines + [line(name, areas(classifier, maps, scenes)) for name, maps in METHODS.items()]


def line(name: str, found: Tensor) -> str:
    """Return the line of a method, from ``areas``."""
    cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(found.mean(0), found.std(0), strict=True)]
    return f"| {name} | {' | '.join(cells)} | {first_ones(found)} |"


def first_ones(found: Tensor) -> str:
    """Return deletion and insertion of the first scenes alone."""
    return ", ".join(f"{mean:.3f}" for mean in found[:FIRST].mean(0))


def main() -> None:
    """Print the table of the model card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repo", metavar="PATH", help="a checkout of facebookresearch/dinov2")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    sys.modules.setdefault("xformers", None)  # type: ignore[arg-type]  # no kernels for a CPU
    obtain(args.repo)
    dinov2_attn.install()
    classifier = classifier_on(load_demo_model())
    print(f"accuracy of the classifier: {accuracy(classifier):.1%}")
    print("\n".join(table(classifier, shown())))


if __name__ == "__main__":
    main()
