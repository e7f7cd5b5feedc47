"""Lines that are wrong, and that a type checker must find."""

from __future__ import annotations

from torch import Tensor, nn

import dinov2_attn
from dinov2_attn import AttentionMaps, Recording
from dinov2_attn.typing import GraftedBlock, GraftedVisionTransformer


def ask(model: GraftedVisionTransformer, block: GraftedBlock, images: Tensor) -> None:
    model.get_last_self_attention(images, queries="csl")  # type: ignore[arg-type]
    model.get_last_self_attention(images, heads="max")  # type: ignore[call-overload]
    model.get_self_attention(images, 1, None, "cls")  # type: ignore[call-overload]
    model.get_last_self_attention("photograph.png")  # type: ignore[arg-type]
    model.get_last_self_attention([images], masks=images)  # type: ignore[call-overload]
    model.forward_features(images, queries="cls")  # type: ignore[call-overload]
    print(model.get_last_self_attention(images)[0].shap)  # type: ignore[attr-defined]
    block(images, return_attn=True)  # type: ignore[call-overload]


def type_a_model(model: nn.Module) -> GraftedVisionTransformer:
    if model.training:
        return model  # type: ignore[return-value]
    return dinov2_attn.grafted("dinov2_vits14")  # type: ignore[arg-type]


def install() -> None:
    dinov2_attn.install(3)  # type: ignore[arg-type]
    dinov2_attn.install(falback=False)  # type: ignore[call-arg]


def look(model: nn.Module, images: Tensor, recording: Recording) -> AttentionMaps:
    dinov2_attn.rollout(model, images, heads="median")  # type: ignore[call-overload]
    dinov2_attn.relevance(model, images, "cat")  # type: ignore[arg-type]
    dinov2_attn.relevance(model, images, 3, "gradcam")  # type: ignore[call-overload]
    print(dinov2_attn.artifact_tokens(model, images).outliers)  # type: ignore[attr-defined]
    print(dinov2_attn.attention_maps(model, [images]).weights)  # type: ignore[attr-defined]
    dinov2_attn.record(model, reduce=len)  # type: ignore[arg-type]
    dinov2_attn.edit(model, keys="csl")  # type: ignore[arg-type]
    dinov2_attn.edit(model, heads={3: "all"})  # type: ignore[dict-item]
    dinov2_attn.add_registers(model, [3])  # type: ignore[arg-type]
    dinov2_attn.record(model, facets=("keys",))  # type: ignore[arg-type]
    print(recording.weight)  # type: ignore[attr-defined]
    return dinov2_attn.attention_maps(model, [images])  # type: ignore[return-value]
