"""What a grafted model and its parts answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import dinov2_attn
from dinov2_attn.typing import (
    Features,
    GraftedAttention,
    GraftedBlock,
    GraftedVisionTransformer,
)


def ask_for_weights(model: GraftedVisionTransformer, images: Tensor) -> None:
    assert_type(model.get_last_self_attention(images), Tensor)
    assert_type(model.get_last_self_attention(images, queries="cls", heads="mean"), Tensor)
    assert_type(model.get_last_selfattention(images), Tensor)
    assert_type(model.get_self_attention(images), tuple[Tensor, ...])
    assert_type(model.get_self_attention(images, 1, queries=[0, 1]), tuple[Tensor, ...])
    assert_type(model.get_self_attention(images, [0], queries=slice(0, 2)), tuple[Tensor, ...])
    assert_type(model.get_self_attention(images, queries=torch.tensor([0])), tuple[Tensor, ...])


def ask_for_weights_of_a_list(model: GraftedVisionTransformer, batches: list[Tensor]) -> None:
    assert_type(model.get_last_self_attention(batches), list[Tensor])
    assert_type(model.get_last_selfattention(tuple(batches)), list[Tensor])
    assert_type(model.get_self_attention(batches, heads="mean"), tuple[list[Tensor], ...])
    masks = [None for _ in batches]
    assert_type(model.get_self_attention(batches, masks=masks), tuple[list[Tensor], ...])


def ask_along_with_features(model: GraftedVisionTransformer, images: Tensor) -> None:
    features = model.forward_features(images, return_attention=True)
    assert_type(features, Features)
    assert_type(features["attentions"], tuple[Tensor, ...])
    assert_type(features["x_norm_clstoken"], Tensor)
    assert_type(model.forward_features(images), dict[str, Any])
    assert_type(model(images, return_attention=True), tuple[Any, tuple[Tensor, ...]])
    _, attentions = model(images, return_attention=True, queries="cls")
    assert_type(attentions, tuple[Tensor, ...])


def ask_along_with_features_of_a_list(
    model: GraftedVisionTransformer, batches: list[Tensor]
) -> None:
    assert_type(model.forward_features(batches, return_attention=True), list[Features])
    outputs = model(batches, return_attention=True)
    assert_type(outputs, tuple[list[Any], tuple[list[Tensor], ...]])


def ask_a_block(block: GraftedBlock, tokens: Tensor) -> None:
    assert_type(block(tokens), Tensor)
    assert_type(block(tokens, return_attention=True, queries="cls"), Tensor)
    assert_type(block([tokens, tokens], return_attention=True), list[Tensor])


def ask_an_attention(attention: GraftedAttention, tokens: Tensor) -> None:
    assert_type(attention(tokens), Tensor)
    assert_type(attention(tokens, return_attn=True, heads="mean"), Tensor)


def type_a_model(model: nn.Module, images: Tensor) -> None:
    typed = dinov2_attn.grafted(model)
    assert_type(typed, GraftedVisionTransformer)
    assert_type(dinov2_attn.grafted(typed), GraftedVisionTransformer)
    assert_type(typed.eval(), GraftedVisionTransformer)
    assert_type(typed.get_last_self_attention(images), Tensor)
