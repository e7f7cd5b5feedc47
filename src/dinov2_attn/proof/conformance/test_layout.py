"""The order of tokens, CLS, registers, patches row by row, on grids that are not square.

Weights identify tokens by their position. If a copy of the code has another order, the weights are
correct, but every map made from them is wrong: transposed or shifted by one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_attn.backbone.contract import options_of
from dinov2_attn.proof.conformance.building import ModelCase, noise, prefix
from dinov2_attn.proof.conformance.code import Code
from dinov2_attn.proof.conformance.reference import is_at_kernel
from dinov2_attn.proof.conformance.synthetic_models import (
    HEAD,
    look_at_what_is_bright,
    mark_prefix,
    photograph,
)
from dinov2_attn.proof.conformance.synthetic_models import slope as set_slope
from dinov2_attn.proof.conformance.tolerances import assert_close

# The option and attribute for the number of registers: DINOv2's, DINOv3's.
_REGISTERS = {"num_register_tokens", "n_storage_tokens"}

CASES = (
    ModelCase(grid=(2, 5)),
    ModelCase(grid=(5, 2), registers=3),
    ModelCase(grid=(3, 4), registers=1, depth=4, chunks=2),
)


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest, model_class: type) -> ModelCase:
    """Return a case with a grid that is not square, with registers if this copy has them."""
    case: ModelCase = request.param
    if case.registers and _REGISTERS.isdisjoint(options_of(model_class)):
        pytest.skip("this model has no registers")
    return case


@pytest.fixture
def model(grafted: Code, model_class: type, case: ModelCase) -> Any:
    """Return a model for the case."""
    return case.build(grafted, model_class)


def test_tokens_are_cls_registers_and_patches(model: Any, case: ModelCase) -> None:
    """N = 1 + R + h·w, where R is the number of register tokens."""
    tokens = model.get_last_self_attention(case.images, queries="cls").shape[-1]
    expected = 1 + case.registers + case.patches
    assert prefix(model) == 1 + case.registers, "expected as many register_tokens as asked for"
    assert tokens == expected, (
        f"expected 1 CLS + {case.registers} registers + {case.patches} patches = {expected} "
        f"tokens; found {tokens}"
    )
    counts = [getattr(model, name) for name in _REGISTERS if hasattr(model, name)]
    assert set(counts or [0]) == {case.registers}


def test_cls_comes_first_and_registers_next(model: Any, case: ModelCase) -> None:
    """Each has its own value, which is found again at its position."""
    tokens = tokens_of(mark_prefix(model), case.images)
    found = [round(value) for value in tokens[0, : prefix(model), 0].tolist()]
    expected = list(range(100, 100 + prefix(model)))
    assert found == expected, (
        f"expected CLS (100) and registers (101, …) first: {expected}; found {found}"
    )


def test_patches_follow_row_by_row(model: Any, case: ModelCase) -> None:
    """Changing the pixels of one patch changes one token."""
    plain = tokens_of(mark_prefix(model), case.images)
    for place, (row, column) in enumerate(case.places, prefix(model)):
        images = case.images
        _pixels(images, case.patch, row, column).add_(1)
        changed = (tokens_of(model, images) != plain).any(-1)
        found = changed[0].nonzero().flatten().tolist()
        assert found == [place], (
            f"expected the patch of row {row}, column {column} of a grid {case.grid} at token "
            f"{place}; found it at {found}"
        )


def test_masks_hide_patches_row_by_row(model: Any, case: ModelCase) -> None:
    """True at w·row + column changes that token to the mask token, and no other."""
    plain = tokens_of(mark_prefix(model), case.images)
    for i in range(case.patches):
        masks = noise(case.batch, case.patches, seed=0) > torch.inf
        masks[:, i] = True
        changed = (tokens_of(model, case.images, masks) != plain).any(-1)
        found = changed[0].nonzero().flatten().tolist()
        assert found == [prefix(model) + i], (
            f"expected a mask on patch {i} to change token {prefix(model) + i}; found {found}"
        )


def test_the_positional_embedding_has_the_grids_rows(model: Any, case: ModelCase) -> None:
    """Set to the number of the row, it grows down the rows and is constant along them."""
    if not hasattr(model, "pos_embed"):
        pytest.skip("this model has a rotation in place of a positional embedding")
    without = tokens_of(mark_prefix(model), case.images)
    added = tokens_of(set_slope(model, case.side), case.images) - without
    rows = added[0, prefix(model) :, 0].detach().reshape(case.grid)
    level = (rows - rows[:, :1]).abs().max() < 1e-3
    grows = (rows.diff(dim=0) > 1e-3).all()
    assert level, f"expected the row's own value all along a row; found {rows.tolist()}"
    assert grows, f"expected values that grow from row to row; found {rows.tolist()}"


def test_a_bright_patch_is_where_the_attention_falls(model: Any, case: ModelCase) -> None:
    """For every token, in the head that attends to bright patches."""
    if any(map(is_at_kernel, model.modules())):
        pytest.skip("its attention is not that of its projection, which this test sets")
    model = look_at_what_is_bright(model)
    for place in case.places:
        image = photograph(case.grid, place, case.patch)
        weights = model.get_last_self_attention(image)[0, HEAD, :, prefix(model) :]
        for row in (0, -1):  # CLS, and the last patch
            found = divmod(int(weights[row].detach().argmax()), case.grid[1])
            assert found == place, (
                f"expected the attention of token {row} at patch (row, column) {place} of a "
                f"grid {case.grid}, which is bright; found {found}"
            )


def test_features_are_sliced_at_the_same_places(model: Any, case: ModelCase) -> None:
    """For what the code itself calls CLS, registers and patches."""
    features = model.forward_features(case.images)
    whole, first = model.norm(features["x_prenorm"]), prefix(model)
    slices = {
        "x_norm_clstoken": whole[:, 0],
        "x_norm_regtokens": whole[:, 1:first],
        "x_storage_tokens": whole[:, 1:first],
        "x_norm_patchtokens": whole[:, first:],
    }
    for name, expected in slices.items():
        if name in features:
            assert_close(features[name], expected, name)


@pytest.mark.parametrize("reshape", [False, True], ids=["flat", "reshaped"])
def test_intermediate_layers_are_the_patches(model: Any, case: ModelCase, reshape: bool) -> None:
    """Row by row, reshaped to the grid or not."""
    if not hasattr(model, "get_intermediate_layers"):
        pytest.skip("this model has no get_intermediate_layers")
    whole = model.norm(model.forward_features(case.images)["x_prenorm"])
    patches = whole[:, prefix(model) :]
    (plain,) = model.get_intermediate_layers(case.images, n=1)
    if case.registers and plain.shape[1] == case.registers + case.patches:
        assert_close(plain, whole[:, 1:], "layers with registers")
        pytest.skip("get_intermediate_layers keeps the registers, as upstream's did at first")
    if not reshape:
        assert_close(plain, patches, "the patches of the last layer")
        return
    (grid,) = model.get_intermediate_layers(case.images, n=1, reshape=True)
    expected = patches.unflatten(1, case.grid).permute(0, 3, 1, 2)
    assert_close(grid, expected, "the patches of the last layer, (B, C, h, w)")


def tokens_of(model: Any, images: Tensor, masks: Tensor | None = None) -> Tensor:
    """Return the tokens of the first block, ``(B, N, C)``, which DINOv3 returns with its grid."""
    tokens: Any = model.prepare_tokens_with_masks(images, masks)
    found: Tensor = tokens[0] if isinstance(tokens, tuple) else tokens
    return found


def _pixels(images: Tensor, size: int, row: int, column: int) -> Tensor:
    return images.unfold(2, size, size).unfold(3, size, size)[:, :, row, column]
