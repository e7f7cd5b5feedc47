"""Softmaxes that a model computes itself, followed to the product that takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

PRODUCTS = {"matmul", "__matmul__", "bmm", "einsum"}
SAME_VALUES = {
    *("dropout", "to", "type", "type_as", "float", "half", "bfloat16", "double"),
    *("contiguous", "detach"),
}
VIEWS = {
    *("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose"),
    *("permute", "expand", "__getitem__"),
}


class Softmaxes(TorchFunctionMode):
    """Keeps each softmax in float64, applies to it what the model does, and reports products.

    Args:
        report: Is called with the weights, with their product, and with the model's own product.

    """

    def __init__(self, report: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.report = report
        self.exact: dict[int, Tensor] = {}  # by the id of the tensor that it stands for
        self.whole: dict[int, Tensor] = {}  # the weights of which it is a view
        self.alive: list[Tensor] = []  # else an id could be given away

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "softmax":
            self._softmax(out, *args, **kwargs)
        elif name in PRODUCTS and self.exact:
            self._product(func, out, args, kwargs)
        elif args and id(args[0]) in self.exact:
            self._follow(func, name, out, args, kwargs)
        return out

    def _softmax(
        self, out: Tensor, scores: Tensor, dim: Any = None, *_: Any, **options: Any
    ) -> None:
        axis = options.get("dim", dim)
        exact = scores.detach().double().softmax(-1 if axis is None else axis).nan_to_num(0.0)
        self._keep(out, exact, exact)

    def _follow(self, func: Any, name: str, out: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        exact, whole = self.exact[id(args[0])], self.whole[id(args[0])]
        if name in SAME_VALUES:
            self._keep(out, exact, whole)
        elif name in VIEWS:
            self._keep(out, func(exact, *args[1:], **kwargs), whole)
        elif name == "clone":
            copy = exact.clone()  # what is written into the copy stays in it
            self._keep(out, copy, copy)
        elif name == "__setitem__":
            func(exact, *args[1:])

    def _keep(self, out: Tensor, exact: Tensor, whole: Tensor) -> None:
        self.alive.append(out)
        self.exact[id(out)], self.whole[id(out)] = exact, whole

    def _product(self, func: Any, out: Tensor, args: tuple[Any, ...], kwargs: Any) -> None:
        flat = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else [arg])]
        factors = [factor for factor in flat if id(factor) in self.exact]
        if factors:
            expected = func(*map(self._in_float64, args), **kwargs)
            self.report(self.whole[id(factors[0])], expected, out)

    def _in_float64(self, argument: Any) -> Any:
        if isinstance(argument, list | tuple):
            return type(argument)(map(self._in_float64, argument))
        if not isinstance(argument, Tensor):
            return argument
        return self.exact.get(id(argument), argument.detach().double())
