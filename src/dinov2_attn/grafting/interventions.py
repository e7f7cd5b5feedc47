"""Changing the tokens of a model and the neurons of its MLPs, for one block of one thread.

Nothing is set on a module. The classes are grafted while a block is open, and each graft asks
whether a block of its own context concerns the module. So copies, pickles and other threads see
the model as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dinov2_attn._compat import (
    grad_mode_kept,
    is_compiling,
    is_foreign_thread,
    is_in_backward,
)
from dinov2_attn._locks import Life
from dinov2_attn.backbone.backbone import Backbone
from dinov2_attn.backbone.mlps import Mlp
from dinov2_attn.backbone.structure import name_of
from dinov2_attn.errors import InvalidInputError, NotEditedError
from dinov2_attn.grafting.registry import REGISTRY, RecordingTarget, locked
from dinov2_attn.typing import Forward

# Takes the neurons of an MLP, ``(B, N, H)``: what its last linear layer is given. Returns others.
NeuronChange = Callable[[Tensor], Tensor]

# The number of registers of a model, by upstream's name and by DINOv3's.
_COUNTS = ("num_register_tokens", "n_storage_tokens")
_TOKENS = "prepare_tokens_with_masks"


class Intervention(Life):
    """What a block changes in the passes of its thread.

    Args:
        backbone: The model.
        changes: What is made of the neurons of some of its MLPs.
        count: The number of tokens to add behind its own registers. They are zero at first.
        lengths: Where none are added, the numbers of tokens that sequences may have.

    Attributes:
        passes: How often tokens were added.
        start: The position of the first token that is added.

    """

    def __init__(
        self,
        backbone: Backbone,
        changes: Sequence[tuple[Mlp, NeuronChange]],
        count: int = 0,
        lengths: Iterable[int] = (),
    ) -> None:
        super().__init__()
        self.backbone, self.count = backbone, count
        self.changes: Mapping[nn.Module, tuple[Mlp, NeuronChange]] = {
            mlp.module: (mlp, change) for mlp, change in changes
        }
        self.passes = 0
        self.start = backbone.prefix
        self.is_open = True
        self._is_preparing = False
        # Of the sequences of the pass that runs, and whether it has come to an MLP.
        self._lengths = set(lengths)
        self._is_running = False

    def adds_to(self, model: object) -> bool:
        """Return whether tokens are to be added to those that ``model`` makes."""
        return self.count > 0 and self.backbone.model is model and not self._is_preparing

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Let the model have its own number of registers inside, while it makes its own tokens."""
        try:
            self._is_preparing = True
            yield
        finally:
            self._is_preparing = False

    def lengthen(self, found: Any, images: Sequence[object]) -> Any:
        """Return what the model ``found``, tokens ``(B, N, C)`` alone or in front, with more."""
        tokens, *others = found if isinstance(found, tuple) else (found,)
        self._check(tokens, images)
        new = tokens.new_zeros(tokens.shape[0], self.count, tokens.shape[2])
        longer = torch.cat((tokens[:, : self.start], new, tokens[:, self.start :]), 1)
        if self._is_running:
            self._is_running = False
            self._lengths.clear()
        self._lengths.add(longer.shape[1])
        self.passes += 1
        return (longer, *others) if isinstance(found, tuple) else longer

    def _check(self, tokens: object, given: Sequence[object]) -> None:
        images = next(one for one in given if isinstance(one, Tensor))
        height, width = self.backbone.grid(images)
        length = self.start + height * width
        if isinstance(tokens, Tensor) and tokens.ndim == 3 and tokens.shape[1] == length:
            return
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise NotEditedError(
            f"tokens (B, {self.start} + {height} · {width}, C): CLS, registers and patches",
            f"{shape} in {name_of(type(self.backbone.model))}",
            "Tokens cannot be added to such a model. Hide its artifacts instead: "
            "edit(model, keys=artifact_tokens(model, images)).",
        )

    def change(self, module: nn.Module, neurons: Tensor) -> Tensor:
        """Return the changed ``neurons`` of the MLP ``module``."""
        self._is_running = True
        # What checkpointing runs again may be of any pass.
        if neurons.ndim != 3 or not (is_in_backward() or neurons.shape[1] in self._lengths):
            raise NotEditedError(
                "neurons (B, N, H) with the tokens of each image in a sequence of its own",
                f"{tuple(neurons.shape)}",
                "Let the model make its tokens inside the block. Pass one batch at a time in place "
                "of a list of batches. Use model.eval() where the model drops samples in training.",
            )
        return self.changes[module][1](neurons)


@contextmanager
def intervening(one: Intervention) -> Iterator[None]:
    """Change the passes of this context as ``one`` says.

    Raises:
        InvalidInputError: If the model does not count its registers, or has tokens of another
            block already.

    """
    if one.count:
        _check_model(one.backbone.model)
    target = RecordingTarget(one)
    try:
        with locked():
            REGISTRY.begin(target)
            _set_grafts(one, target)
            _OPEN.append(ref(one))
            _note_modules()
        _HERE.set((*_HERE.get(), ref(one)))
        with grad_mode_kept():
            yield
    finally:
        one.is_open = False
        _HERE.set(tuple(other for other in _HERE.get() if _is_open(other)))
        with locked():
            _OPEN[:] = filter(_is_open, _OPEN)
            _note_modules()
            REGISTRY.release(target)


def added_tokens(model: object = None) -> int:
    """Return how many tokens blocks of this context add to ``model``, or to all models."""
    if is_compiling() or not _OPEN:
        return 0
    return sum(one.count for one in _here() if model is None or one.adds_to(model))


# The blocks of this context, in the order in which they were entered.
_HERE: ContextVar[tuple[ref[Intervention], ...]] = ContextVar("dinov2_attn_here", default=())
# Those of all threads. Threads of autograd have no block of their own.
_OPEN: list[ref[Intervention]] = []
# What they change: a graph can look through a list of modules, and not for a thread.
_MODULES: list[nn.Module] = []


def _note_modules() -> None:
    models = [one.backbone.model for one in _opened() if one.count]
    _MODULES[:] = [*models, *(module for one in _opened() for module in one.changes)]


def _is_open(one: ref[Intervention]) -> bool:
    found = one()
    return found is not None and found.is_open


def _opened() -> list[Intervention]:
    return [one for one in (other() for other in tuple(_OPEN)) if one is not None and one.is_open]


def _here() -> list[Intervention]:
    """Return the open blocks of this context, if it has not moved to another thread."""
    found = (one() for one in _HERE.get())
    return [one for one in found if one is not None and one.is_open and one.is_here]


def _changing(module: nn.Module) -> list[Intervention]:
    """Return the blocks that change the neurons of ``module`` in this thread.

    The backward pass of a GPU runs in a thread of its own, where checkpointing runs modules again.
    It has those of the one thread that changes the module.
    """
    here = [one for one in _here() if module in one.changes]
    if not here and is_in_backward() and is_foreign_thread():
        found = [one for one in _opened() if module in one.changes]
        here = found if len({one.thread for one in found}) == 1 else []
    return here


def _check_model(model: Any) -> None:
    name = _count_of(model)
    if name is None or not isinstance(vars(model)[name], int) or _TOKENS in vars(model):
        raise InvalidInputError(
            "a vision transformer that counts its registers: num_register_tokens of DINOv2, "
            "n_storage_tokens of DINOv3",
            name_of(type(model)),
            "The first revisions of DINOv2 take all tokens but CLS for patches. Build the model by "
            "newer code, and load the same weights: torch.hub.load('facebookresearch/dinov2', "
            "'dinov2_vitl14').",
        )
    if any(one.backbone.model is model and one.count for one in _here()):
        raise InvalidInputError(
            "a model without added registers",
            f"{name_of(type(model))} inside another block that adds some",
            "Give all neurons to one block.",
        )


def _count_of(model: Any) -> str | None:
    return next((name for name in _COUNTS if name in vars(model)), None)


def _set_grafts(one: Intervention, target: RecordingTarget) -> None:
    for module in one.changes:
        _graft(type(module), "forward", _graft_mlp, target)
    if not one.count:
        return
    model = one.backbone.model
    name = _count_of(model)
    _graft(type(model), _TOKENS, _graft_tokens, target)
    if name is not None and not REGISTRY.claim(type(model), name, target):
        REGISTRY.set(type(model), name, _counted(name), target)


def _graft(
    cls: type, name: str, graft: Callable[[Forward], Forward], target: RecordingTarget
) -> None:
    """Graft the method ``name`` where ``cls`` has it from."""
    owner = next(base for base in cls.__mro__ if name in vars(base))
    if not REGISTRY.claim(owner, name, target):
        REGISTRY.set(owner, name, graft(vars(owner)[name]), target)


def _graft_tokens(original: Forward) -> Forward:
    """Let the method that makes tokens of images add those of a block."""

    @functools.wraps(original, updated=())
    def prepare_tokens_with_masks(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            _refuse_graph(self)
            return original(self, *args, **kwargs)
        one = next((one for one in _here() if one.adds_to(self)), None)
        if one is None:
            return original(self, *args, **kwargs)
        with one.preparing():
            found = original(self, *args, **kwargs)
        return one.lengthen(found, [*args, *kwargs.values()])

    return prepare_tokens_with_masks


def _counted(name: str) -> property:
    """Return the number of registers as an attribute of a class, with those that are added.

    The model's own number stays in its ``__dict__``, which copies and pickles read.
    """

    def get(self: Any) -> Any:
        if name not in self.__dict__:
            raise AttributeError(name)  # nn.Module says so in its own words
        own = self.__dict__[name]
        added = added_tokens(self)
        return own + added if added else own

    def set_(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    def delete(self: Any) -> None:
        self.__dict__.pop(name)

    return property(get, set_, delete)


def _graft_mlp(original: Forward) -> Forward:
    """Let the ``forward`` of an MLP give its neurons to blocks."""

    @functools.wraps(original, updated=())
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            _refuse_graph(self)
            return original(self, *args, **kwargs)
        changing = _changing(self)
        if not changing:
            return original(self, *args, **kwargs)
        last = changing[0].changes[self][0].last
        change = [functools.partial(one.change, self) for one in changing]
        tokens = next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        with _Neurons(last, change, tokens.shape[:-1]) as neurons:
            output = original(self, *args, **kwargs)
        neurons.check(self)
        return output

    return forward


class _Neurons(TorchFunctionMode):
    """Changes what the last linear layer of an MLP is given.

    Its neurons have the ``shape`` of the tokens, ``(B, N)``. xFormers' SwiGLU joins the two.
    """

    def __init__(self, last: nn.Linear, changes: Sequence[NeuronChange], shape: torch.Size) -> None:
        super().__init__()
        self._weight, self._changes, self._shape, self._calls = last.weight, changes, shape, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            given, weight, bias = _linear(*args, **kwargs)
            if weight is self._weight:
                self._calls += 1
                neurons = given.reshape(*self._shape, given.shape[-1])
                for change in self._changes:
                    neurons = change(neurons)
                return func(neurons.reshape(given.shape), weight, bias)
        return func(*args, **kwargs)

    def check(self, module: nn.Module) -> None:
        """Raise ``NotEditedError`` unless there was one product with the weight."""
        if self._calls != 1:
            raise NotEditedError(
                f"one product with the last weight of {name_of(type(module))}",
                f"{self._calls} that can be seen",
                "xFormers computes a SwiGLU in one kernel: set XFORMERS_DISABLED=1 before DINOv2 "
                "is imported, or run the model in float32.",
            )


def _linear(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


def _refuse_graph(module: nn.Module) -> None:
    """Raise ``NotEditedError`` if a graph is made of a ``module`` that some block changes."""
    if any(one is module for one in _MODULES):
        raise in_a_graph()


def in_a_graph() -> NotEditedError:
    """Return the error for a graph that would not see where the block ends."""
    return NotEditedError(
        "a forward pass in eager mode inside the block",
        "one that torch.compile or torch.export makes a graph of",
        "Run the eager module: compiled._orig_mod(images), or compiled(images) under "
        'torch.compiler.set_stance("force_eager").',
    )
