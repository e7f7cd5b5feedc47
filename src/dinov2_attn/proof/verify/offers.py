"""Where a model itself offers attention: its methods, keywords, tuples and attributes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

KEYWORDS = (
    *("return_attn", "return_attns", "return_attention", "return_attentions"),
    *("return_attention_weights", "return_attn_weights"),
    *("output_attentions", "output_attention", "need_weights"),
)
_METHOD = re.compile(
    r"(get|forward|extract|return|compute)_\w*att(entio)?n(s|_\w*)?|\w*selfatt\w*|att(entio)?ns?_?maps?"
)
# Methods of every model of these, and not of the copy.
_OTHERS = ("torch.", "transformers.modeling_utils", "transformers.integrations", "builtins")


@dataclass(frozen=True)
class Seen:
    """What a module was given and returned in an ordinary pass."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True)
class Offer:
    """One way to ask for attention.

    Attributes:
        where: The call, as one would write it.
        module: The module that is asked; its kernels are watched.
        ask: Calls it.
        plain: The same call without the keyword; ``None`` for methods of their own.

    """

    where: str
    module: nn.Module
    ask: Callable[[], Any]
    plain: Callable[[], Any] | None = None


def observe(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, dict[str, Seen]]:
    """Run ``run``, and return its result and what each module of ``model`` saw last."""
    seen: dict[str, Seen] = {}
    hooks = []
    for name, module in model.named_modules():

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            seen[name] = Seen(name, module, copied(args), copied(kwargs), copied(output))

        hooks.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        return run(), seen
    finally:
        for hook in hooks:
            hook.remove()


def copied(value: Any) -> Any:
    """Return ``value`` with copies of its tensors, which code may change in place."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(copied(part) for part in value)
    if type(value) is dict:
        return {name: copied(part) for name, part in value.items()}
    return value


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a result with their place in it, such as ``[1][0]``."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from tensors(part, f"{path}[{name!r}]")
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from tensors(part, f"{path}[{i}]")


def of_model(model: nn.Module, top: str, given: str, images: Tensor) -> Iterator[Offer]:
    """Yield the offers of the model itself, which is called ``top`` and its images ``given``."""
    for name in _methods(model):
        if _METHOD.fullmatch(name):
            yield _method(model, f"{top}.{name}", name, (images,), {}, given)
        else:
            yield from _keywords(model, top, name, (images,), {}, given)


def of_modules(seen: Mapping[str, Seen], top: str) -> Iterator[Offer]:
    """Yield the offers of the modules inside: of the last one of each class, with its tokens."""
    last = {type(one.module): one for one in seen.values() if one.name}
    for one in last.values():
        where = place_of(top, one.name)
        for name in _methods(one.module):
            if name == "forward":
                yield from _keywords(one.module, where, name, one.args, one.kwargs, "tokens")
            elif _METHOD.fullmatch(name):
                place = f"{where}.{name}"
                yield _method(one.module, place, name, one.args, one.kwargs, "tokens")


def kept(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Yield tensors that a pass left in attributes named after attention: module, name, value."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and re.search("att(entio)?n", attribute):
                yield name, attribute, value


def path_of(name: str) -> str:
    """Return the path of a module as Python writes it: ``blocks[0].attn`` for ``blocks.0.attn``."""
    return re.sub(r"(^|\.)(\d+)", r"[\2]", name)


def place_of(top: str, name: str) -> str:
    """Return the same below ``top``, as ``model.blocks[0].attn``."""
    return f"{top}.{path_of(name)}".replace(".[", "[").rstrip(".")


def _methods(module: nn.Module) -> list[str]:
    """Return the public methods that the classes of the copy define."""
    found = []
    for name in dir(type(module)):
        owner = next((c for c in type(module).__mro__ if name in vars(c)), object)
        own = not owner.__module__.startswith(_OTHERS)
        if own and not name.startswith("_") and inspect.isfunction(vars(owner)[name]):
            found.append(name)
    return found


def _parameters(method: Any) -> dict[str, inspect.Parameter]:
    with suppress(TypeError, ValueError):
        return dict(inspect.signature(method).parameters)
    return {}


def _method(module: nn.Module, where: str, name: str, args: Any, kwargs: Any, shown: str) -> Offer:
    method = getattr(module, name)
    if not _parameters(method):
        return Offer(f"{where}()", module, method)
    return Offer(f"{where}({shown})", module, lambda: method(*args, **kwargs))


def _keywords(
    module: nn.Module, where: str, name: str, args: Any, kwargs: Any, shown: str
) -> Iterator[Offer]:
    method = module if name == "forward" else getattr(module, name)
    known = _parameters(getattr(module, name))
    taken = [keyword for keyword in KEYWORDS if keyword in known]
    if not taken and name == "forward" and _reads_config(module, known):
        taken = ["output_attentions"]
    where = where if name == "forward" else f"{where}.{name}"
    for keyword in taken:
        rest = {key: value for key, value in kwargs.items() if key != keyword}

        def ask(keyword: str = keyword, rest: dict[str, Any] = rest) -> Any:
            return method(*args, **rest, **{keyword: True})

        def plain(keyword: str = keyword, rest: dict[str, Any] = rest) -> Any:
            default = {} if keyword != "need_weights" else {keyword: False}
            return method(*args, **rest, **default)

        yield Offer(f"{where}({shown}, {keyword}=True)", module, ask, plain)


def _reads_config(module: nn.Module, known: Mapping[str, inspect.Parameter]) -> bool:
    """Return whether this is a model of transformers, whose ``**kwargs`` take the keyword."""
    open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
    top = hasattr(type(module), "from_pretrained")
    return open_ended and top and hasattr(getattr(module, "config", None), "output_attentions")
