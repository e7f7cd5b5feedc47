"""What a relevance is of: a number for each image, made of what the model returned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_attn.backbone.layout import Layout
from dinov2_attn.backbone.watching import watching
from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from dinov2_attn.maps.layers import Recorded
from dinov2_attn.math.selection import name_token, positions, whole_number
from dinov2_attn.math.token_names import Token, position_of


@dataclass(frozen=True)
class TokenSimilarity:
    """The cosine similarity of two tokens behind the last norm. Made by ``token_similarity``."""

    token: Token
    other: Token = "cls"


# What users pass; see ``relevance``.
Target = Callable[[Any], Tensor] | int | Sequence[int] | Tensor | TokenSimilarity


def token_similarity(token: Token, other: Token = "cls") -> TokenSimilarity:
    """Return a target for ``relevance``: how similar two tokens are, by their cosine.

    Tokens are those behind the last norm of a DINOv2, or what a model returns as ``(B, N, C)``.

    Args:
        token: ``"cls"``, ``"register:K"`` with K from 1, a patch ``(row, column)`` counted from 0,
            or a position, CLS being 0.
        other: The other one, in the same words.

    """
    return TokenSimilarity(token, other)


@dataclass
class Pass:
    """What a model returned, and the tokens behind its last norm if they were seen."""

    layout: Layout
    output: Any = None
    normed: list[Tensor] = field(default_factory=list)


@contextmanager
def watching_norm(modules: Recorded, seen: list[Tensor]) -> Iterator[None]:
    """Append what the last norm of a DINOv2 returns in this thread to ``seen``."""
    norm = getattr(modules.backbone and modules.backbone.model, "norm", None)
    if not isinstance(norm, nn.Module):
        yield
        return

    def note(output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append(output)

    with watching(norm, after=note):
        yield


def score(target: Any, found: Pass, images: int) -> Tensor:
    """Return the target of each image added up.

    Raises:
        InvalidInputError: If ``target`` is no target, does not fit the output, or does not depend
            on it.
        OutOfRangeError: If there is no such class or token.

    """
    value = _value(target, found, images)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise InvalidInputError(
            "a target that is a tensor of floating-point numbers",
            f"{value.dtype}" if isinstance(value, Tensor) else type(value).__name__,
            "Return one number for each image: lambda output: output[:, 3].",
        )
    if value.ndim and tuple(value.shape) not in ((images,), (images, 1)):
        raise InvalidInputError(
            f"one number for each of {images} images, of shape ({images},)",
            f"a target of shape {tuple(value.shape)}",
            "Select or add up in the target: lambda output: output[:, 3].",
        )
    if not value.requires_grad:
        raise InvalidInputError(
            "a target that depends on what the model returned",
            "one that autograd does not follow to the model",
            "Compute it from the output alone, without detach(), item() and no_grad().",
        )
    return value.sum()


def in_words(target: Any, layout: Layout) -> tuple[str, ...]:
    """Return what a ``target`` that ``score`` took is called: once, or once for each image."""
    if isinstance(target, TokenSimilarity):
        first, second = (_token_name(one, layout) for one in (target.token, target.other))
        return (f"the similarity of {first} and {second}",)
    if isinstance(target, Tensor) and target.is_floating_point():
        return ("the similarity to an embedding",)
    if callable(target):
        return ("a function of the output",)
    given = _plain(target)
    several = isinstance(given, list | tuple)
    return tuple(f"class {number}" for number in (given if several else [given]))


def _plain(target: Any) -> Any:
    """Return the class numbers of a tensor, or of an array or number of NumPy, as plain ones."""
    if isinstance(target, list | tuple):
        return [_plain(one) for one in target]
    return target.tolist() if hasattr(target, "tolist") else target


def _token_name(token: Token, layout: Layout) -> str:
    return name_token(_position(token, layout), layout.prefix, layout.grid)


def _position(token: Token, layout: Layout) -> int:
    """Return where ``token`` is in the sequence. A number may be that of a token behind patches."""
    if isinstance(token, str | tuple | list):
        return position_of(token, layout.prefix, layout.grid)
    return positions(whole_number(token, "tokens"), layout.length)[0]


def _value(target: Any, found: Pass, images: int) -> Any:
    if isinstance(target, TokenSimilarity):
        return _similarity(target, found)
    if isinstance(target, Tensor) and target.is_floating_point():
        return _cosine(target, found.output, images)
    if callable(target):
        return target(found.output)
    return _class(target, found.output, images)


def _similarity(target: TokenSimilarity, found: Pass) -> Tensor:
    tokens = _tokens(found)
    first, second = (
        tokens[:, _position(one, found.layout)] for one in (target.token, target.other)
    )
    return F.cosine_similarity(first, second, dim=-1)


def _tokens(found: Pass) -> Tensor:
    """Return the tokens ``(B, N, C)`` of a pass."""
    output, length = found.output, found.layout.length
    last = getattr(output, "last_hidden_state", output)
    for tokens in (last, *reversed(found.normed)):
        if isinstance(tokens, Tensor) and tokens.ndim == 3 and tokens.shape[1] == length:
            return tokens
    raise InvalidInputError(
        f"a model that returns its {length} tokens, or a DINOv2 with one norm for them",
        f"an output of type {type(output).__name__}",
        "Pass a target that computes the similarity from the output: lambda output: …",
    )


def _cosine(embedding: Tensor, output: Any, images: int) -> Tensor:
    channels = output.shape[-1] if isinstance(output, Tensor) and output.ndim == 2 else None
    fits = embedding.ndim in (1, 2) and embedding.shape[-1] == channels
    if not fits or embedding.shape[:-1] not in ((), (1,), (images,)):
        raise InvalidInputError(
            f"an embedding (C,) or ({images}, C) for an output ({images}, C)",
            f"{tuple(embedding.shape)} for {_described(output)}"
            + (f", of {channels} channels" if channels else ""),
            "Compare them in a target of your own: lambda output: …",
        )
    return F.cosine_similarity(output, embedding.to(output), dim=-1)


def _class(target: Any, output: Any, images: int) -> Tensor:
    given = _plain(target)
    numbers = list(given) if isinstance(given, list | tuple) else [given] * images
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in numbers):
        raise InvalidInputError(
            "a target: a class number, one for each image, an embedding, token_similarity(…) or a "
            "function of the output",
            repr(target),
            "Pass a class number, or lambda output: output[:, 3].",
        )
    logits = getattr(output, "logits", output)
    if len(numbers) != images:
        raise InvalidInputError(
            f"one class for each of {images} images",
            f"{len(numbers)}",
            "Pass one class number for all images, or a list of one for each.",
        )
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise InvalidInputError(
            "a model that returns (B, classes), or an output with logits",
            _described(output),
            "Pass a function of the output: lambda output: …",
        )
    _check_classes(numbers, logits.shape[1])
    index = torch.tensor(numbers, device=logits.device)[:, None]
    return logits.gather(1, index % logits.shape[1])


def _check_classes(numbers: Sequence[int], classes: int) -> None:
    if outside := [one for one in numbers if not -classes <= one < classes]:
        raise OutOfRangeError(
            f"a class number below {classes}: the model returns {classes} classes",
            str(outside[0]),
            "Classes count from 0, and negative numbers from the end.",
        )


def _described(output: Any) -> str:
    shape = getattr(output, "shape", None)
    return type(output).__name__ if shape is None else f"an output of shape {tuple(shape)}"
