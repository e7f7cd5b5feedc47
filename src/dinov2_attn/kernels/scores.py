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


def _factors(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Factors | None:
    if name == "einsum":
        return _factors_of_einsum(*args)
    named = [kwargs[key] for key in ("other", "mat2", "batch1", "batch2") if key in kwargs]
    given = [*args, *named][1 if name == "baddbmm" else 0 :]
    if len(given) < 2 or not all(isinstance(one, Tensor) and one.ndim > 1 for one in given[:2]):
        return None
    return Factors(given[0], given[1].transpose(-2, -1))


def _factors_of_einsum(equation: Any, *operands: Any) -> Factors | None:
    """Return the factors if ``equation`` says which letters are rows, columns and channels."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if len(operands) != 2 or not isinstance(equation, str) or "." in equation:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    summed = [letter for letter in left if letter in right and letter not in output]
    if len(summed) != 1 or len(output) < 2:
        return None
    own, theirs = (
        (operands, (left, right)) if output[-1] in right else (operands[::-1], (right, left))
    )
    lead, channel = output[:-2], summed[0]
    return _permuted(own, theirs, (lead + output[-2] + channel, lead + output[-1] + channel))


def _permuted(
    operands: tuple[Any, ...], names: tuple[str, str], wanted: tuple[str, str]
) -> Factors | None:
    if any(sorted(have) != sorted(want) for have, want in zip(names, wanted, strict=True)):
        return None
    query, key = (
        tensor.permute([have.index(letter) for letter in want])
        for tensor, have, want in zip(operands, names, wanted, strict=True)
    )
    return Factors(query, key)
