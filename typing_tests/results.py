"""What the functions of the package return."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import dinov2_attn
from dinov2_attn import ArtifactTokens, AttentionMaps, Recording, RegisterNeurons, Relevance
from dinov2_attn.maps.rollout import Rollout
from dinov2_attn.typing import Grid, Source


def look_at_maps(model: nn.Module, images: Tensor) -> None:
    maps = dinov2_attn.attention_maps(model, images, queries="cls")
    assert_type(maps, AttentionMaps)
    assert_type(maps, AttentionMaps[Tensor])
    assert_type(maps.weights, tuple[Tensor, ...])
    assert_type(maps.patch_maps(), tuple[Tensor, ...])
    assert_type(maps.prefix_mass()[0], Tensor)
    assert_type(maps.cpu(), AttentionMaps)
    assert_type(maps.to("cpu"), AttentionMaps)
    assert_type(dinov2_attn.attention_maps(dinov2_attn.grafted(model), images), AttentionMaps)


def look_at_layers(model: nn.Module, images: Tensor) -> None:
    maps = dinov2_attn.attention_maps(model, images, [0])
    assert_type(maps.layers, tuple[int | str, ...])
    assert_type(maps.sources, tuple[Source, ...])
    with dinov2_attn.record(model) as recording:
        model(images)
    paths = [str(layer) for layer in recording.layers if isinstance(layer, str)]
    assert_type(dinov2_attn.attention_maps(model, images, paths or None), AttentionMaps)
    assert_type(dinov2_attn.status().at_kernel, dict[str, str])


def look_at_maps_of_a_list(model: nn.Module, batches: list[Tensor]) -> None:
    maps = dinov2_attn.attention_maps(model, batches)
    assert_type(maps, list[AttentionMaps])
    assert_type(maps[0].patch_maps(), tuple[Tensor, ...])


def change(model: nn.Module, images: Tensor) -> None:
    def flip(layer: int | str, weights: Tensor) -> Tensor:
        return weights.flip(1)

    maps = dinov2_attn.attention_maps(model, images)
    found = dinov2_attn.artifact_tokens(model, images)
    with dinov2_attn.record(model) as recording:
        model(images)
    with (
        dinov2_attn.edit(model, heads={0: [0, 1], 1: 1}) as edit,
        dinov2_attn.edit(model, ["blocks.0.attn"], heads=0),
        dinov2_attn.edit(model, 2, keys=[3, 4], queries=[0, 3]),
        dinov2_attn.edit(model, weights=flip, queries="cls"),
        dinov2_attn.edit(model, frozen=maps),
        dinov2_attn.edit(model, frozen=recording),
    ):
        model(images)
    assert_type(edit.layers, tuple[int | str, ...])
    if found.mask.any():
        with dinov2_attn.edit(model, keys=found), dinov2_attn.edit(model, keys=found.mask):
            model(images)


def add_registers(model: nn.Module, images: Tensor) -> None:
    found = dinov2_attn.artifact_tokens(model, images)
    some = dataclasses.replace(found, mask=torch.ones_like(found.mask))
    neurons = dinov2_attn.find_register_neurons(model, [images], 3, artifacts=[some])
    assert_type(neurons, RegisterNeurons)
    assert_type(neurons.by_layer(), dict[int, list[int]])
    assert_type(neurons.to("cpu").scores, Tensor)
    if hasattr(model, "num_register_tokens") or hasattr(model, "n_storage_tokens"):
        with dinov2_attn.add_registers(model, neurons):
            model(images)
        with dinov2_attn.add_registers(model, {0: [1, 2], 1: [0]}, 2):
            model(images)


def roll_out(model: nn.Module, images: Tensor) -> None:
    rollout = dinov2_attn.rollout(model, images, heads="max")
    assert_type(rollout, Rollout)
    assert_type(rollout.patch_maps(), Tensor)
    assert_type(rollout.to("cpu"), Rollout)
    assert_type(rollout.numpy(), Rollout[npt.NDArray[Any]])
    assert_type(dinov2_attn.rollout(model, [images]), list[Rollout])


def explain(model: nn.Module, images: Tensor) -> None:
    found = dinov2_attn.relevance(model, images, 3, "legrad")
    assert_type(found, Relevance)
    assert_type(found.weights, Tensor)
    assert_type(found.patch_maps(), Tensor)
    target = dinov2_attn.token_similarity(1)
    assert_type(dinov2_attn.relevance(model, [images], target), list[Relevance])


def find_artifacts(model: nn.Module, images: Tensor) -> None:
    found = dinov2_attn.artifact_tokens(model, images)
    assert_type(found, ArtifactTokens)
    assert_type(found.mask, Tensor)
    assert_type(found.suspicious, Tensor)
    assert_type(found.cpu(), ArtifactTokens)
    assert_type(found.numpy().mask, npt.NDArray[Any])
    assert_type(dinov2_attn.artifact_tokens(model, [images]), list[ArtifactTokens])


def record_passes(model: nn.Module, images: Tensor) -> None:
    with dinov2_attn.record(model, queries="cls") as recording:
        model(images)
    assert_type(recording, Recording[Tensor])
    assert_type(recording.passes, list[AttentionMaps[Tensor]])
    assert_type(recording[0], AttentionMaps)
    assert_type(recording[:1], list[AttentionMaps])
    assert_type([one.grid for one in recording], list[Grid | None])
    assert_type(recording.weights, tuple[Tensor, ...])
    assert_type(recording.layers, tuple[int | str, ...])
    assert_type(recording.prefix, int)
    assert_type(recording.patch_maps(), tuple[Tensor, ...])
    assert_type(recording.cpu(), AttentionMaps[Tensor])
    assert_type(recording.to("cpu"), AttentionMaps[Tensor])
    assert_type(recording.numpy(), AttentionMaps[npt.NDArray[Any]])


def record_beside_weights(model: nn.Module, images: Tensor) -> None:
    with dinov2_attn.record(model, gradients=True, facets=("key", "value")) as recording:
        model(images).sum().backward()
    assert_type(recording, Recording[Tensor])
    assert_type(recording.gradients, tuple[Tensor, ...])
    assert_type(recording[0].gradients, tuple[Tensor, ...])
    assert_type(recording.facet("key", joined=True), tuple[Any, ...])


def record_what_is_made_of_weights(model: nn.Module, images: Tensor) -> None:
    def largest(layer: int, weights: Tensor) -> float:
        return layer + float(weights.detach().max())

    with dinov2_attn.record(model, reduce=largest) as recording:
        model(images)
    assert_type(recording.weights, tuple[float, ...])
    assert_type(recording.passes[0], AttentionMaps[float])


def keep_results(model: nn.Module, images: Tensor, path: Path) -> None:
    dinov2_attn.attention_maps(model, images).save(path)
    assert_type(AttentionMaps.load(path), AttentionMaps)
    dinov2_attn.rollout(model, images).save(path)
    assert_type(Rollout.load(path), Rollout)
    dinov2_attn.artifact_tokens(model, images).save(path)
    assert_type(ArtifactTokens.load(path), ArtifactTokens)
