"""The attention of one forward pass, and how it lies on the patch grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, overload

from torch import Tensor

from dinov2_attn.errors import InvalidInputError
from dinov2_attn.typing import Grid

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import TypeVar

    W = TypeVar("W", default=Tensor)
else:
    from typing import TypeVar

    W = TypeVar("W")


@dataclass(frozen=True, eq=False)
class AttentionMaps(Generic[W]):
    """The attention weights of one forward pass, and how their rows and columns are laid out.

    =======  =========================================================================
    weights  one entry for each layer: ``(B, heads, Q, N)``, ``(B, Q, N)`` for the mean of
             heads, a list of these where the pass ran on a list of batches, or whatever
             ``reduce`` made of them
    layers   the blocks they belong to, counted from 0
    grid     height and width ``(h, w)`` of the patch grid, a list of these for a list of
             batches; ``None`` where tokens did not come from images of whole patches
    prefix   ``1 + R``: the columns of CLS and the registers, in front of the patches
    queries  the tokens whose rows these are, by position, 0 being CLS; a list of these for
             a list of batches; ``None`` for all of them
    =======  =========================================================================

    For a type checker ``AttentionMaps[W]`` says what an entry is, ``AttentionMaps`` that it
    is a tensor.
    """

    weights: tuple[W, ...]
    layers: tuple[int, ...]
    grid: Grid | list[Grid | None] | None
    prefix: int
    queries: tuple[int, ...] | list[tuple[int, ...]] | None = None

    def patch_maps(self) -> tuple[W, ...]:
        """Return what the rows give to patches, for each layer ``(…, h, w)``.

        The equivalent code is ``weights[..., prefix:].unflatten(-1, grid)``: nothing is
        rescaled, so that a map sums to one only together with ``prefix_mass()``. Raises
        ``InvalidInputError`` where the columns are not the prefix and the grid.
        """
        return self._each(self._map)

    def prefix_mass(self) -> tuple[W, ...]:
        """Return what the rows give to CLS and the registers together, for each layer ``(…)``.

        What each of these tokens holds by itself is ``weights[..., :prefix]``.
        """
        return self._each(self._prefix_mass)

    def cpu(self) -> AttentionMaps[W]:
        """Return the same on the CPU and outside of autograd's graph."""
        return self._with(lambda weights: weights.detach().cpu())

    @overload
    def numpy(self: AttentionMaps[Tensor]) -> AttentionMaps[npt.NDArray[Any]]: ...
    @overload
    def numpy(self: AttentionMaps[list[Tensor]]) -> AttentionMaps[list[npt.NDArray[Any]]]: ...

    def numpy(self) -> AttentionMaps[Any]:
        """Return the same with NumPy arrays for tensors; bfloat16, which it lacks, as float32."""
        return self._with(_array)

    def save(self, path: str | Path) -> None:
        """Write all of it to one safetensors file, which appears whole or not at all.

        Tensors are named ``layer.11``, or ``layer.11.0`` for the first of a list of batches;
        grid, prefix, layers and queries stand in the metadata as JSON. Raises ``InvalidInputError``
        unless weights are tensors, and ``UnwritableOutputError``.
        """
        from dinov2_attn.maps.storage import save

        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> AttentionMaps[Any]:
        """Read what ``save`` wrote. Raises ``UnreadableFileError``."""
        from dinov2_attn.maps.storage import load

        return load(Path(path))

    def _map(self, weights: Any, grid: Grid | None) -> Any:
        height, width = self._checked(weights, grid)
        return weights[..., self.prefix :].reshape(*weights.shape[:-1], height, width)

    def _prefix_mass(self, weights: Any, grid: Grid | None) -> Any:
        self._checked(weights, grid)
        return weights[..., : self.prefix].sum(-1)

    def _checked(self, weights: Any, grid: Grid | None) -> Grid:
        shape = tuple(getattr(weights, "shape", ()))
        if grid is None:
            raise InvalidInputError(
                "maps whose patch grid is known",
                f"weights {shape} of tokens that came from no images of whole patches",
                "Say dataclasses.replace(maps, grid=(h, w)) if you know it; of a recording "
                "say it of maps.passes[0].",
            )
        count = self.prefix + grid[0] * grid[1]
        if not shape or shape[-1] != count:
            raise InvalidInputError(
                f"{self.prefix} + {grid[0]} · {grid[1]} = {count} columns: CLS and registers, "
                "then one for each patch",
                f"weights of shape {shape}" if shape else f"{type(weights).__name__}",
                "Correct prefix or grid, or keep the columns in reduce.",
            )
        return grid

    def _each(self, change: Callable[[Any, Any], Any]) -> tuple[Any, ...]:
        def entry(weights: Any) -> Any:
            if not isinstance(weights, list):
                return change(weights, self.grid)
            grids = self.grid if isinstance(self.grid, list) else [self.grid] * len(weights)
            return [change(one, grid) for one, grid in zip(weights, grids, strict=True)]

        return tuple(map(entry, self.weights))

    def _with(self, change: Callable[[Tensor], Any]) -> AttentionMaps[Any]:
        return replace(self, weights=self._each(lambda weights, _: change(weights)))


def _array(weights: Tensor) -> npt.NDArray[Any]:
    weights = weights.detach().cpu()
    try:
        return weights.numpy()
    except TypeError:  # NumPy has no bfloat16
        return weights.float().numpy()
