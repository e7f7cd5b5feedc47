"""What stands out among the numbers of an image, told by their median and not by their mean."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dinov2_attn.errors import InvalidInputError

# 7.5 median absolute deviations are five standard deviations of a bell curve.
DEVIATIONS = 7.5
# Of the median: norms that hardly differ have next to no deviation.
FLOOR = 2.5


@dataclass(frozen=True)
class Rule:
    """What makes a value an outlier among others."""

    deviations: float = DEVIATIONS
    floor: float = FLOOR

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and 0 < value < math.inf):
                raise InvalidInputError(
                    f"{field.name} as a number above 0",
                    repr(value),
                    "Leave it out for the default.",
                )

    def thresholds(self, values: Tensor) -> Tensor:
        """Return the threshold ``(B,)`` of ``values (B, h, w)``: NaN where a value is NaN."""
        flat = values.flatten(1)
        middle = median(flat)
        spread = median((flat - middle[:, None]).abs())
        return torch.maximum(middle + self.deviations * spread, self.floor * middle)

    def outliers(self, values: Tensor) -> Tensor:
        """Return which of ``values (B, h, w)``, none of them negative, are above the threshold."""
        return values > self.thresholds(values)[:, None, None]

    def excess(self, norms: Tensor) -> Tensor:
        """Return how many times its threshold the most outstanding norm of each image is, (B,)."""
        greatest, thresholds = norms.flatten(1).amax(1), self.thresholds(norms)
        # Nought by nought is NaN, and nothing; anything else by nought is beyond comparison.
        return (greatest / thresholds).nan_to_num()


def median(values: Tensor) -> Tensor:
    """Return the median of each row: of an even number of values the mean of both in the middle."""
    ordered = values.sort(dim=1).values  # NaN comes last
    half = values.shape[1] // 2
    middle = (ordered[:, half] + ordered[:, -half - 1]) / 2
    return torch.where(ordered[:, -1].isnan(), ordered[:, -1], middle)
