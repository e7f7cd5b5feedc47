"""Real upstream models whose tokens stand in another place, as in copies of DINOv2 out there."""

from __future__ import annotations

import torch
from torch import nn

from dinov2_attn.backbone.backbone import Backbone
from tests.support.strategies import randomise

PATCH = 2


def build(upstream, base=None, *, registers=0, depth=1, dtype=torch.float32, **options):
    if registers:
        options["num_register_tokens"] = registers
    model = (base or upstream.cls("DinoVisionTransformer"))(
        img_size=4 * PATCH, patch_size=PATCH, embed_dim=24, depth=depth, num_heads=2,
        **{"block_chunks": 0, **options},
    )  # fmt: skip
    return randomise(model.double(), 1).to(dtype)


def attention_in(model, layer=0):
    return Backbone(model).blocks[layer].attn


def registers_behind(upstream, count):
    """As test-time-registers does: further registers behind the patches."""

    class Behind(upstream.cls("DinoVisionTransformer")):
        def prepare_tokens_with_masks(self, x, masks=None):
            tokens = super().prepare_tokens_with_masks(x, masks)
            return torch.cat([tokens, tokens.new_ones(len(tokens), count, tokens.shape[-1])], 1)

    return Behind


def several_per_cell(upstream, count, *, planes, prefix):
    """Each patch ``count`` times, and each in another form."""

    class Several(upstream.cls("DinoVisionTransformer")):
        def prepare_tokens_with_masks(self, x, masks=None):
            tokens = super().prepare_tokens_with_masks(x, masks)
            patches = tokens[:, prefix:]
            forms = [patches.roll(i, -1) * (i + 1) - i for i in range(count)]
            cells = torch.stack(forms, 1 if planes else 2).flatten(1, 2)
            return torch.cat([tokens[:, :prefix], cells], 1)

    return Several


def windowed(upstream, windows, grid):
    """As RF-DETR's: a sequence for each window, with a CLS of its own."""
    (down, across), (height, width) = windows, grid

    class Windowed(upstream.cls("DinoVisionTransformer")):
        def prepare_tokens_with_masks(self, x, masks=None):
            tokens = super().prepare_tokens_with_masks(x, masks)
            patches = tokens[:, 1:].unflatten(1, (down, height, across, width))
            sequences = patches.transpose(2, 3).flatten(3, 4).flatten(0, 2)
            cls = tokens[:, :1].repeat_interleave(down * across, 0)
            return torch.cat([cls, sequences], 1)

    return Windowed


class Frames(nn.Module):
    """A video ``(B, T, C, H, W)``, each frame in a sequence of its own, or all in one."""

    def __init__(self, model, *, joint=False):
        super().__init__()
        self.model, self.joint = model, joint

    def forward(self, videos):
        if not self.joint:
            return self.model(videos.flatten(0, 1))
        tokens = self.model.prepare_tokens_with_masks(videos.flatten(0, 1))
        return self.model.blocks[0](tokens.unflatten(0, videos.shape[:2]).flatten(1, 2))


class Seen(nn.Module):
    """An attention over tokens that ``stem`` makes of images."""

    def __init__(self, stem):
        super().__init__()
        self.stem, self.attn = stem, nn.Identity()

    def forward(self, images):
        return self.attn(self.stem(images))


class Stem(nn.Module):
    """Overlapping convolutions, as many hybrids begin."""

    def __init__(self):
        super().__init__()
        steps = [(3, 32), (32, 64), (64, 128)]
        self.convs = nn.Sequential(
            *(m for a, b in steps for m in (nn.Conv2d(a, b, 3, 2, 1), nn.GELU()))
        )

    def forward(self, images):
        return self.convs(images).flatten(2).mT
