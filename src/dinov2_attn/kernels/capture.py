"""Seeing the kernel call of one attention module, whatever stands before or behind it.

A ``TorchFunctionMode`` is active inside the module's own forward and nowhere else. Around a whole
model it would switch off PyTorch's fast paths in other modules, and so change their bits.

Explicit code has no kernel. There the result of a softmax is followed until a product takes it as
its left factor: through dropout, casts, views and gates. xFormers' function does not pass through
the mode, so its replacement reports the call (see xformers.py).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dinov2_attn._compat import depth_of_modes, storage_of, version_of
from dinov2_attn._locks import cached_property
from dinov2_attn.errors import NotEditedError, NotRecordedError
from dinov2_attn.kernels.call import SDPA, ExplicitCall, KernelCall, as_given, by_heads, fused_call
from dinov2_attn.kernels.edited import Pattern, editable
from dinov2_attn.kernels.place import Place, place_of
from dinov2_attn.kernels.scores import Factors, Scores, einsum_of, matrices

# Makes of what a kernel returned what its module is given.
Change = Callable[[Tensor], Tensor]

# What a receiver is given: a call as the module made it, or an edited one.
Take = Callable[[Any], Change | None]

# Changes a pattern. The second argument runs the kernel as the module called it, once.
Edit = Callable[[Pattern, Callable[[], Tensor]], Pattern]

_PRODUCTS = {"matmul", "__matmul__", "mm", "bmm", "linalg_matmul", "einsum", "baddbmm"}

# The functions with which something begins that is followed.
_SOFTMAXES = {"softmax", "special_softmax"}
_WATCHED = {SDPA, *_SOFTMAXES, *_PRODUCTS}

# The names by which classes call their number of heads.
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads", "nheads", "n_head")


SEEN_KERNELS = (
    "scaled_dot_product_attention, xFormers' function, or a softmax that is multiplied with the "
    "values"
)


class StopPassError(BaseException):
    """Ends a forward pass whose rest is not needed. No code of a model should catch it."""


class _Softmax(NamedTuple):
    """A softmax that is followed.

    Attributes:
        tensor: What the next operation is given.
        weights: The same before dropout.
        origin: Of which softmax it is: the same object for all that is made of one.
        dropout: The probability with which ``tensor`` has lost weights.
        factors: What the scores are the product of, if that was seen.
        place: That of the weights in autograd's graph, if dropout writes into them.

    """

    tensor: Tensor
    weights: Tensor
    origin: object
    dropout: float = 0.0
    factors: Factors | None = None
    place: Place | None = None


class _Factor(NamedTuple):
    """A factor of a product: the tensor that was given, and its dimension that is summed."""

    given: Tensor
    dim: int

    @property
    def last(self) -> Tensor:
        """The tensor with that dimension at the end: the very tensor if it is there already."""
        at_end = self.dim in (-1, self.given.ndim - 1)
        return self.given if at_end else self.given.movedim(self.dim, -1)

    def like(self, last: Tensor) -> Tensor:
        """Return another tensor of the shape of ``last`` as it has to be given."""
        return last.movedim(-1, self.dim)


class Capture(TorchFunctionMode):
    """Calls ``take`` with the kernel call of ``module`` while its forward runs.

    Args:
        module: The attention module.
        take: Called after the kernel.
        stops: Whether to call ``take`` before the kernel, and to end the pass then.
        edit: Changes the weights that the kernel uses.

    Attributes:
        calls: The kernel calls seen.

    """

    def __init__(
        self, module: nn.Module, take: Take, *, stops: bool = False, edit: Edit | None = None
    ) -> None:
        super().__init__()
        self._outer: Capture | None = None
        self._depth: int | None = None  # of PyTorch's modes, before it was entered
        self._module = module
        self._take = take
        self._stops = stops
        self._edit = edit
        self._softmaxes: dict[int, _Softmax] = {}
        # What dropout was given, for each tensor that came out of it, in the same layout.
        self._undropped: dict[Hashable, Tensor] = {}
        self._used: dict[int, Tensor] = {}  # the softmax that was edited, and what is made of it
        # The matrix that was given to receivers, and how often it had been written then.
        self._given: tuple[Tensor | None, int | None] = (None, None)
        self._scores: Scores | None = None  # most kernels have no product to follow
        self.calls = 0

    def __enter__(self) -> Capture:
        self._outer = _CURRENT.capture
        self._depth = depth_of_modes()
        _CURRENT.capture = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def leave(self) -> None:
        """Leave it if an interruption ended its own ``__exit__``."""
        self._leave_modes()
        if _CURRENT.capture is self:
            _CURRENT.capture = self._outer

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave_modes()
        _CURRENT.capture = self._outer
        self._softmaxes.clear()
        self._undropped.clear()
        self._used.clear()
        (matrix, version), self._given = self._given, (None, None)
        if kind is None and matrix is not None and version_of(matrix) != version:
            raise _overwritten(self._module)
        self._scores = None

    def _leave_modes(self) -> None:
        # PyTorch takes a mode away while it runs, and an interruption then may lose it.
        if self._depth is not None and depth_of_modes() > self._depth:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if _CURRENT.capture is not self:
            return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        follows = self._softmaxes or self._used or self._scores is not None
        if not follows and name not in _WATCHED:
            return func(*args, **kwargs) if kwargs else func(*args)  # most of all calls
        kwargs = kwargs or {}
        if name == SDPA:
            return self._sdpa(func, args, kwargs)
        if name in _SOFTMAXES:
            return self._after_softmax(func(*args, **kwargs), args, kwargs)
        return self._follow(name, func, args, kwargs)

    def _follow(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _tensors_in((args, kwargs)) if self._used else ()
        used = next((one for one in given if storage_of(one) in self._used), None)
        if used is not None and name in _PRODUCTS:
            raise _in_parts(self._module, "another product of it")
        if not self._softmaxes:
            out = self._before_softmax(name, func, args, kwargs)
        elif name in _PRODUCTS:
            out = self._product(name, func, args, kwargs)
        else:
            out = self._other(name, func, args, kwargs)
        if used is not None and isinstance(out, Tensor) and out.numel() == used.numel():
            self._used[storage_of(out)] = out
        return out

    def _sdpa(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        heads = heads_of(self._module)

        def restored(out: Tensor) -> Tensor:
            # Fused kernels have the heads of a token side by side, so that code may view them as
            # one vector.
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
            return as_given(out, shape_of_sdpa(*args, **kwargs), heads)

        call = fused_call(*args, **kwargs, heads=heads)
        return self.ran(call, lambda: func(*args, **kwargs), self._heads_first, restored)

    def ran(
        self,
        call: KernelCall,
        run: Callable[[], Any],
        heads_first: Callable[[Tensor], Tensor],
        restored: Callable[[Tensor], Any],
        factor: Tensor | None = None,
    ) -> Any:
        """Run a kernel and take its ``call``. With ``stops``, only take it.

        Args:
            call: What the kernel is given.
            run: Runs it.
            heads_first: Makes its output ``(B, heads, N, d)``.
            restored: Makes the kernel's output of an edited one, which is ``(B, heads, N, d)``.
                For explicit code it is given the edited factor.
            factor: What explicit code multiplies, ``(B, heads, Q, N)``.

        Returns:
            What ``run`` returns, or what it would return with the edited weights.

        """
        self.calls += 1
        taken: Any = call
        # A kernel may call another one, and so does what takes the call. Not a context manager: on
        # a GPU each microsecond counts.
        before, _CURRENT.capture = _CURRENT.capture, None
        try:
            if self._edit is not None:
                run = functools.cache(run)
                pattern = self._edit(editable(call, factor), lambda: heads_first(run()))
                if pattern.is_changed:
                    taken, run = pattern.call(), _edited(pattern, run, heads_first, restored)
            if self._stops:
                self._take(taken)
                raise StopPassError
            output = run()
            change = self._take(taken.ran(output, heads_first))
            return output if change is None else change(output)
        finally:
            _CURRENT.capture = before

    @cached_property
    def _heads_first(self) -> Change:
        """Return what makes a tensor ``(B, heads, …, …)``. A graph may keep it."""
        return functools.partial(by_heads, heads=heads_of(self._module))

    def _before_softmax(
        self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        out = func(*args, **kwargs)
        if name in _PRODUCTS:
            self._scores = self._scores or Scores()
            self._scores.note_product(name, args, kwargs, out)
        elif self._scores is not None:
            self._scores.follow(args, out)
        return out

    def _after_softmax(self, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scores = args[0] if args else kwargs.get("input")
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if out.ndim > 1 and dim in (-1, out.ndim - 1):
            # What is written into may be a buffer that the next layer writes into.
            weights = out.clone() if "out" in kwargs else out
            factors = self._scores.of(scores) if self._scores else None
            self._softmaxes[storage_of(out)] = _Softmax(out, weights, object(), factors=factors)
        return out

    def _other(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``func``, and follow a softmax through it: a cast, a mask, a gate, a view."""
        operands = (*args, kwargs.get("input"))
        given = next((arg for arg in operands if self._found(arg) is not None), None)
        source = self._found(given)
        if source is None or given is None or name.endswith("_like"):
            return func(*args, **kwargs)
        if "dropout" in name and (p := _probability(args, kwargs)):
            return self._dropped(given, source, p, name, func, args, kwargs)
        before = self._undropped.get(_layout(given))
        if before is not None and name.endswith("_"):  # in place
            before = before.clone()
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or out.numel() != source.tensor.numel():
            return out
        if before is not None:
            with unseen():
                before = func(*_with(args, given, before), **_with(kwargs, given, before))
            self._undropped[_layout(out)] = before
            self._softmaxes.setdefault(storage_of(out), source._replace(tensor=out, weights=before))
        elif "dropout" in name:
            found = _Softmax(out, out, source.origin, factors=source.factors)
            self._softmaxes[storage_of(out)] = found
        else:
            # What is written into other memory may be a buffer of all layers.
            copied = name.endswith("_") and storage_of(out) != storage_of(given)
            weights = out.clone() if copied else out
            found = _Softmax(out, weights, source.origin, factors=source.factors)
            self._softmaxes.setdefault(storage_of(out), found)
        return out

    def _dropped(
        self,
        given: Tensor,
        source: _Softmax,
        probability: float,
        name: str,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run dropout on ``given``, and keep what it was given."""
        place, weights = None, self._undropped.get(_layout(given), given)
        if _drops_in_place(name, kwargs):
            place = place_of(weights, self._heads_first)
            weights = weights.clone()
        out = func(*args, **kwargs)
        self._undropped[_layout(out)] = weights
        place = source.place or place or place_of(weights, self._heads_first)
        found = _Softmax(out, weights, source.origin, probability, source.factors, place)
        self._softmaxes[storage_of(out)] = found
        return out

    def _product(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = self._explicit(_factors(name, args, kwargs))
        if found is None:
            return func(*args, **kwargs)
        factor, call = found
        if self._edit is not None:
            self._use(factor.given)
            if factor.given.numel() != call.matrix.numel():
                raise _in_parts(self._module, "a product of a part of it")
        self._softmaxes.clear()

        def multiplied(edited: Tensor) -> Any:
            edited = as_given(edited, factor.last.shape, heads_of(self._module))
            given, old = factor.like(edited), factor.given
            return func(*_with(args, old, given), **_with(kwargs, old, given))

        self._given = (call.matrix, version_of(call.matrix))
        multiply = functools.partial(func, *args, **kwargs)
        last = self._heads_first(factor.last)
        return self.ran(call, multiply, self._heads_first, multiplied, last)

    def _use(self, tensor: Tensor) -> None:
        """Note ``tensor`` and all else that is made of its softmax: an edit reaches it alone."""
        found = self._softmaxes[storage_of(tensor)]
        for place, one in self._softmaxes.items():
            if one.origin is found.origin:
                self._used[place] = one.tensor

    def _explicit(self, factors: Sequence[_Factor]) -> tuple[_Factor, ExplicitCall] | None:
        """Return the call if one of two factors is a softmax whose last dimension is summed."""
        for factor, value in zip(factors, factors[::-1], strict=True):
            found = self._found(factor.given)
            if found is not None and _along_last(found.tensor, factor.last):
                return factor, self._call(found, factor, value)
        return None

    def _call(self, found: _Softmax, factor: _Factor, value: _Factor) -> ExplicitCall:
        """Return the call of a product of a softmax and values."""
        made_of = found.factors and [self._heads_first(one) for one in found.factors]
        query, key = made_of or (None, None)
        weights, place = found.weights, found.place or place_of(found.weights, self._heads_first)
        before = self._undropped.get(_layout(factor.given))
        if before is not None:
            weights = before.movedim(factor.dim, -1)
        elif _is_whole(found, factor.given):  # the very tensor, also if it was permuted
            weights = factor.last
            heads_first, dim = self._heads_first, factor.dim
            place = place_of(factor.given, lambda g: heads_first(g.movedim(dim, -1)))
        return ExplicitCall(
            self._heads_first(weights.to(factor.given.dtype)),
            self._heads_first(value.last.transpose(-2, -1)),
            query,
            key,
            dropout=found.dropout,
            place=place,
        )

    def _found(self, tensor: object) -> _Softmax | None:
        return self._softmaxes.get(storage_of(tensor)) if isinstance(tensor, Tensor) else None


class _Current(threading.local):
    """The capture of the module that runs in this thread."""

    def __init__(self) -> None:
        self.capture: Capture | None = None


_CURRENT = _Current()


def current_capture() -> Capture | None:
    """Return the capture of the attention module that runs in this thread."""
    return _CURRENT.capture


@contextmanager
def unseen() -> Iterator[None]:
    """Capture nothing inside."""
    before = _CURRENT.capture
    try:
        _CURRENT.capture = None
        yield
    finally:
        _CURRENT.capture = before


def heads_of(module: nn.Module) -> int | None:
    """Return the number of heads of an attention module, by the names that classes use."""
    for name in _HEADS:
        heads = getattr(module, name, None)
        if isinstance(heads, int):
            return heads
    return None


def check_calls(calls: int, module: str, expected: int = 1) -> None:
    """Raise ``NotRecordedError`` unless an attention module called one kernel as often as that."""
    if calls == expected:
        return
    often = "once in a pass" if expected == 1 else f"{expected} times for {expected} tensors"
    raise NotRecordedError(
        f"{module} to call one kernel {often}: {SEEN_KERNELS}",
        f"{calls} calls" if calls else "none that can be seen",
        "Leave this module out with layers=[...]. Weights made by exp and a sum, by "
        "flex_attention, or inside a custom or compiled operator cannot be seen.",
    )


def _overwritten(module: nn.Module) -> NotRecordedError:
    return NotRecordedError(
        f"weights that {type(module).__name__} leaves as they were multiplied with the values",
        "that it writes into them later in the same forward",
        "Leave this module out with layers=[...], or let its code write into a copy.",
    )


def _in_parts(module: nn.Module, found: str) -> NotEditedError:
    return NotEditedError(
        f"one product of the whole softmax in {type(module).__name__}, so that an edit changes all "
        "of its use",
        found,
        "Leave this layer out with layers=[...]. record(model) gives its weights.",
    )


def _edited(
    pattern: Pattern,
    original: Callable[[], Any],
    heads_first: Callable[[Tensor], Tensor],
    restored: Callable[[Tensor], Any],
) -> Callable[[], Any]:
    """Return what runs the kernel with another ``pattern``."""
    return lambda: restored(pattern.run(lambda: heads_first(original())))


def shape_of_output(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> list[int]:
    """Return the shape of what a fused kernel returns."""
    del key
    return [*query.shape[:-1], value.shape[-1]]


def shape_of_sdpa(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> list[int]:
    """Return the shape of what PyTorch's kernel returns. Samples and heads may be shared."""
    ndim = max(query.ndim, key.ndim, value.ndim)
    leads = ([*[1] * (ndim - one.ndim), *one.shape[:-2]] for one in (query, key, value))
    return [*map(max, *leads), query.shape[-2], value.shape[-1]]


def _tensors_in(given: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments, in lists of operands too."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, list | tuple | dict):
        for one in given.values() if isinstance(given, dict) else given:
            yield from _tensors_in(one)


def _with(given: Any, old: Tensor, new: Tensor) -> Any:
    """Return arguments with ``new`` in the place of ``old``, in lists of operands too."""
    if isinstance(given, dict):
        return {key: _with(one, old, new) for key, one in given.items()}
    if isinstance(given, list | tuple):
        return type(given)(_with(one, old, new) for one in given)
    return new if given is old else given


def _factors(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Factor]:
    """Return the two factors of a product, each with the dimension that is summed."""
    if name != "einsum":
        return [_Factor(*one) for one in zip(matrices(name, args, kwargs), (-1, -2), strict=False)]
    found = einsum_of(*args)
    if found is None:
        return []
    pairs = zip(found.operands, found.names, strict=True)
    return [_Factor(tensor, _index(own, found.summed)) for tensor, own in pairs]


def _index(names: str, letter: str) -> int:
    """Return the dimension of ``letter``, from the end where a dot for any dimensions is before."""
    index = names.index(letter)
    return index - len(names) if "." in names[:index] else index


def _is_whole(found: _Softmax, factor: Tensor) -> bool:
    """Return whether ``factor`` has all numbers of a softmax, which nothing has written over."""
    is_own = not found.dropout and storage_of(found.weights) == storage_of(factor)
    return is_own and factor.numel() == found.weights.numel()


def _layout(tensor: Tensor) -> Hashable:
    """Return what tells ``tensor`` from other views of its memory."""
    # As text: in a graph a size may be a symbol, which has no hash.
    return storage_of(tensor), str((tensor.storage_offset(), tensor.shape, tensor.stride()))


def _along_last(softmax: Tensor, factor: Tensor) -> bool:
    """Return whether the last dimension of ``factor`` is that of the softmax."""
    return (
        factor.ndim > 1
        and factor.shape[-1] == softmax.shape[-1]
        and factor.stride(-1) == softmax.stride(-1)
    )


def _given_to_dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by their names. ``torch.dropout`` calls one of them ``train``."""
    return dict(zip(("input", "p", "training"), args, strict=False)) | kwargs


def _probability(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Return the probability with which this call of dropout drops."""
    given = _given_to_dropout(args, kwargs)
    training = given.get("training", given.get("train", True))
    return float(given.get("p", 0.5)) if training else 0.0


def _drops_in_place(name: str, kwargs: dict[str, Any]) -> bool:
    """Return whether this call writes into what it is given, as ``torch.dropout_`` does."""
    # PyTorch's own functions hand this argument on by its name, however it was given.
    return name.endswith("_") or bool(kwargs.get("inplace"))
