"""Passes that go on from the weights that are recorded, in the place of the kernel's output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from dinov2_attn.errors import InvalidInputError
from dinov2_attn.grafting.channel import Editor
from dinov2_attn.kernels.edited import EditedCall, EditedProduct, Part, Pattern
from dinov2_attn.typing import Layer


@dataclass
class FromWeights(Editor):
    """Multiplies the weights of some layers with the values, so that no kernel runs beside.

    Explicit code does this itself, and is left as it is.

    Attributes:
        wanted: The attention modules, with what they are called.
        is_checked: Whether the first call of each is proved.

    """

    wanted: Mapping[nn.Module, Layer]
    is_checked: bool = True

    @property
    def replaces(self) -> bool:
        """True: the kernel runs for a proof only."""
        return True

    @property
    def is_of_recording(self) -> bool:
        """True: questions inside of the block are answered as outside."""
        return True

    def wants(self, attention: nn.Module) -> bool:
        """Return whether ``attention`` is that of a layer to record."""
        return attention in self.wanted

    def edit(self, attention: nn.Module, pattern: Pattern) -> Pattern:
        """Return the pattern whose output is made of its weights."""
        if isinstance(pattern, EditedProduct):
            return pattern
        if pattern.dropout:
            raise InvalidInputError(
                "a kernel that drops no weights, for features made of the recorded ones",
                f"one of layer {self.wanted[attention]} that drops some with probability "
                f"{pattern.dropout:g}",
                'Call model.eval() first, or leave features="from_weights" out.',
            )
        return pattern.each(self._explicit)

    def _explicit(self, part: Part) -> Part:
        return part.explicit() if isinstance(part, EditedCall) else part
