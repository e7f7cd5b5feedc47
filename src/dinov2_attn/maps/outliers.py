"""Outliers among the numbers of an image, judged by their median and not by their mean."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dinov2_attn.errors import InvalidInputError

# 7.5 median absolute deviations are five standard deviations of a bell curve.
DEVIATIONS = 7.5
# In medians: norms that hardly differ have almost no deviation.
FLOOR = 2.5


@dataclass(frozen=True)
class Rule:
    """The rule that makes a value an outlier.

    Attributes:
        deviations: The least distance from the median, in median absolute deviations.
        floor: The least outlier, in medians.

    """

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
        """Return the mask of ``values (B, h, w)``, none of them negative, above the threshold."""
        return values > self.thresholds(values)[:, None, None]

    def excess(self, norms: Tensor) -> Tensor:
        """Return the largest norm of each image in units of its threshold, ``(B,)``."""
        greatest, thresholds = norms.flatten(1).amax(1), self.thresholds(norms)
        # 0/0 is NaN and becomes 0; anything else by 0 becomes the largest number.
        return (greatest / thresholds).nan_to_num()


def median(values: Tensor) -> Tensor:
    """Return the median of each row; of an even number of values, the mean of the middle two."""
    ordered = values.sort(dim=1).values  # NaN comes last
    half = values.shape[1] // 2
    middle = (ordered[:, half] + ordered[:, -half - 1]) / 2
    return torch.where(ordered[:, -1].isnan(), ordered[:, -1], middle)
