"""Principal components of the features of patches."""

from __future__ import annotations

import torch
from torch import Tensor


def principal_components(features: Tensor, count: int = 3) -> Tensor:
    """Return the first principal components of all patches of a batch.

    One mean and one set of directions serve all images, so that values compare between them. The
    sign of a direction is that in which its largest channel is positive.

    Args:
        features: ``(B, C, h, w)``.
        count: How many components. Those beyond the number of channels are zero.

    Returns:
        ``(B, count, h, w)``, float64, centred, the component of the largest variance first.

    """
    batch, channels, *grid = features.shape
    rows = features.detach().double().movedim(1, -1).reshape(-1, channels)
    rows = rows - rows.mean(0)
    _, directions = torch.linalg.eigh(rows.T @ rows)  # of growing variance
    chosen = directions.flip(-1)[:, :count]
    largest = chosen.gather(0, chosen.abs().argmax(0, keepdim=True))
    found = rows @ (chosen * largest.sign())
    found = torch.nn.functional.pad(found, (0, count - chosen.shape[1]))
    return found.reshape(batch, *grid, count).movedim(-1, 1)
