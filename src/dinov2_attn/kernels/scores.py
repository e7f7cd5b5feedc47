"""Which queries and keys the softmax of explicit code was made of.

A product of two matrices may be that of queries and keys. It is followed through scales, biases,
masks and casts until a softmax takes it. Only weak references are kept, so that no matrix lives
longer.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor

from dinov2_attn._compat import storage_of


class Factors(NamedTuple):
    """Query ``(…, Q, d)`` and key ``(…, N, d)`` of a product ``(…, Q, N)``."""

    query: Tensor
    key: Tensor


class Scores:
    """The products of one forward that a softmax has not taken yet."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[ref[Tensor], Factors]] = {}

    def note_product(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: object
    ) -> None:
        """Note the product ``out`` of a function that is called ``name``."""
        factors = _factors(name, args, kwargs)
        if factors is not None and isinstance(out, Tensor):
            self._found[storage_of(out)] = (ref(out), factors)

    def follow(self, args: tuple[Any, ...], out: object) -> None:
        """Note that ``out`` was made of the first of ``args``, if that is a product."""
        factors = self.of(args[0]) if self._found and args else None
        if factors is None or not isinstance(out, Tensor) or out.numel() != args[0].numel():
            return
        self._found[storage_of(out)] = (ref(out), factors)

    def of(self, tensor: object) -> Factors | None:
        """Return what ``tensor`` is the product of, None if it is none."""
        if not isinstance(tensor, Tensor):
            return None
        held, factors = self._found.get(storage_of(tensor), (None, None))
        return factors if held is not None and held() is not None else None


def matrices(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the two factors of a product of matrices, or nothing if they are none."""
    names = ("input", "other", "mat2", "batch1", "batch2")
    given = [*args, *(kwargs[key] for key in names if key in kwargs)]
    given = given[1:] if name == "baddbmm" else given
    are_two = len(given) == 2 and all(isinstance(one, Tensor) and one.ndim > 1 for one in given)
    return given if are_two else []


class Einsum(NamedTuple):
    """An einsum of two operands that sums over one letter of both.

    Attributes:
        operands: The two tensors.
        names: Their letters, with a dot for any dimensions.
        summed: The letter.
        output: The letters of the result, none if the equation does not name them.

    """

    operands: tuple[Tensor, Tensor]
    names: tuple[str, str]
    summed: str
    output: str


def einsum_of(equation: str, *operands: Any) -> Einsum | None:
    """Return what an einsum with these arguments computes, None if it is no product of two."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if len(operands) != 2:
        return None
    inputs, _, output = equation.replace(" ", "").replace("...", ".").partition("->")
    left, _, right = inputs.partition(",")
    if any(len({*name}) < len(name) for name in (left, right)):  # twice a letter: a diagonal
        return None
    summed = [letter for letter in left if letter in right and letter not in {*output, "."}]
    return Einsum(operands, (left, right), summed[0], output) if len(summed) == 1 else None


def _factors(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Factors | None:
    if name == "einsum":
        found = einsum_of(*args)
        return None if found is None else _factors_of_einsum(found)
    pair = matrices(name, args, kwargs)
    return Factors(pair[0], pair[1].transpose(-2, -1)) if pair else None


def _factors_of_einsum(found: Einsum) -> Factors | None:
    """Return the factors if the equation says which letters are rows, columns and channels."""
    operands, names, channel, output = found
    if len(output) < 2 or "." in output:
        return None
    if output[-1] not in names[1]:
        operands, names = operands[::-1], names[::-1]
    lead, row, column = output[:-2], output[-2], output[-1]
    return _permuted(operands, names, (lead + row + channel, lead + column + channel))


def _permuted(
    operands: tuple[Tensor, Tensor], names: tuple[str, str], wanted: tuple[str, str]
) -> Factors | None:
    if any(sorted(have) != sorted(want) for have, want in zip(names, wanted, strict=True)):
        return None
    query, key = (
        tensor.permute([have.index(letter) for letter in want])
        for tensor, have, want in zip(operands, names, wanted, strict=True)
    )
    return Factors(query, key)
