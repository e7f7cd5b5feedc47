"""Artifact tokens as large models make them, planted in a small model of real classes.

A few neurons of one MLP fire at marked patches alone, and their columns in its last linear layer
are so large that the norms of these patches are outliers from there on.
"""

from __future__ import annotations

import torch

from dinov2_attn.backbone.backbone import flat_blocks


def last_of(mlp):
    """Return the last linear layer of ``mlp``."""
    return mlp.fc2 if hasattr(mlp, "fc2") else mlp.w3


def marked_images(model, grid, places, seed=0):
    """Return noise with one mark for each image, at ``places`` (row, column).

    The mark is a patch like the others, but the same in all images.
    """
    side = model.patch_size
    generator = torch.Generator().manual_seed(seed)
    like = next(model.parameters())
    shape = (len(places), 3, grid[0] * side, grid[1] * side)
    images = torch.randn(shape, generator=generator, dtype=torch.float64)
    mark = torch.randn(3, side, side, generator=generator, dtype=torch.float64) * 1.5
    for image, (row, column) in zip(images, places, strict=True):
        image[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = mark
    return images.to(like.dtype)


@torch.no_grad()
def plant(model, layer, neurons, images, places, *, size=40.0):
    """Let ``neurons`` of block ``layer`` fire at the marks of ``images`` alone.

    Together with their columns they make a token ``size`` times as long as others.
    """
    block = flat_blocks(model.blocks)[layer]
    given, ends = [], []
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, args: given.append(args[0])),
        block.register_forward_hook(lambda _, __, output: ends.append(output)),
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    tokens = given[0]
    width = images.shape[-1] // model.patch_size
    own = tokens.shape[1] - width * (images.shape[-2] // model.patch_size)
    marked = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    for image, (row, column) in enumerate(places):
        marked[image, own + row * width + column] = True
    # Fisher's direction: where marks are far apart from other tokens, for their spread.
    apart = tokens[marked].mean(0) - tokens[~marked].mean(0)
    spread = torch.cov(tokens[~marked].T) + 1e-3 * torch.eye(len(apart), dtype=tokens.dtype)
    towards = torch.linalg.solve(spread, apart)
    along = tokens @ towards
    low, high = along[~marked].max(), along[marked].min()
    assert high > low, "the marks cannot be told apart"
    scale = 60 / (high - low)
    end = ends[0][0] if isinstance(ends[0], list) else ends[0]
    typical = end.norm(dim=-1).median()
    last = last_of(block.mlp)
    for i, neuron in enumerate(neurons):
        _set_row(block.mlp, neuron, towards * scale, -(high + low) / 2 * scale)
        noise = torch.Generator().manual_seed(100 + i)
        column = torch.randn(last.out_features, generator=noise, dtype=torch.float64)
        column *= size * typical / 30 / block.ls2(column.to(last.weight)).norm()
        last.weight[:, neuron] = column.to(last.weight.dtype)


def _set_row(mlp, neuron, row, bias):
    if hasattr(mlp, "fc1"):
        mlp.fc1.weight[neuron], mlp.fc1.bias[neuron] = row, bias
        return
    # silu(x1) · x2: the second factor is one.
    if hasattr(mlp, "w12"):
        hidden = mlp.w12.out_features // 2
        gates = [(mlp.w12, neuron), (mlp.w12, hidden + neuron)]
    else:
        gates = [(mlp.w1, neuron), (mlp.w2, neuron)]
    (first, i), (second, j) = gates
    first.weight[i], first.bias[i] = row, bias
    second.weight[j], second.bias[j] = 0, 1


@torch.no_grad()
def attract(model, images, places, *, score=12.0):
    """Let CLS attend to the tokens at ``places`` in the last block of a DINOv2, by each head.

    Keys of tokens like these grow by ``score`` for the queries of CLS.
    """
    attention = flat_blocks(model.blocks)[-1].attn
    given = []
    hook = attention.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    model(images)
    hook.remove()
    tokens = given[0]
    height, width = (side // model.patch_size for side in images.shape[-2:])
    own = tokens.shape[1] - height * width
    marked = torch.stack(
        [tokens[image, own + row * width + column] for image, (row, column) in enumerate(places)]
    ).mean(0)
    channels = tokens.shape[2]
    queries = attention.qkv(tokens[:, 0]).mean(0)[:channels].unflatten(0, (attention.num_heads, -1))
    for head, query in enumerate(queries):
        size = query.square().sum() * query.numel() ** -0.5
        rows = slice(channels + head * len(query), channels + (head + 1) * len(query))
        attention.qkv.weight[rows] += (
            score / size * torch.outer(query, marked / marked.square().sum())
        )
