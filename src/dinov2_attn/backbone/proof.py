"""The proof at install: small modules in float64, a few milliseconds, no random number drawn.

Each check builds one small instance of the class, runs upstream's own code on it and compares. A
difference raises ``IncompatibleUpstreamError``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dinov2_attn._compat import without_modes
from dinov2_attn.backbone import contract
from dinov2_attn.backbone.backbone import Backbone
from dinov2_attn.backbone.projection import project
from dinov2_attn.backbone.structure import Role, name_of, role_of_module
from dinov2_attn.errors import IncompatibleUpstreamError
from dinov2_attn.kernels.branches import branches
from dinov2_attn.kernels.call import KernelCall
from dinov2_attn.kernels.capture import SEEN_KERNELS, Capture
from dinov2_attn.kernels.xformers import Kernel, flag_of, is_gated
from dinov2_attn.math.attention import attention_weights
from dinov2_attn.typing import Forward

# No two of tokens, channels, heads and head channels are the same number.
_DIM, _HEADS, _TOKENS = 10, 2, 7
_PATCH, _GRID = 2, (2, 3)

# float64, sums of a few dozen terms of order one: anything above is another formula.
_TOLERANCE = 1e-9


@contextmanager
def sandbox() -> Iterator[None]:
    """Run checks on the CPU, without autograd and without a change of any random state.

    Surrounding modes are off, because a fake tensor has no values to compare. Autocast may be on,
    because it does not change float64.
    """
    with ExitStack() as stack:
        stack.enter_context(without_modes())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        default = torch.get_default_dtype()
        if default not in (torch.float32, torch.float64):  # old torch initialises no others
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, default)
        # Only under a user's default device: the context slows every call inside.
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.no_grad())
        yield


def measure_kernel(cls: type, forward: Forward) -> Kernel:
    """Measure whether each branch of ``forward`` uses ``module.scale``, by changing it."""
    module, x = _build(cls, dim=_DIM, num_heads=_HEADS), _tokens()
    runs = branches(forward)
    if not hasattr(module, "scale"):
        return Kernel(forward, dict.fromkeys(runs, False))
    before = {flag: run(module, x) for flag, run in runs.items()}
    module.scale *= 1.5
    return Kernel(
        forward,
        {flag: not torch.equal(before[flag], run(module, x)) for flag, run in runs.items()},
    )


def prove_attention(cls: type, forward: Forward, grafted: Forward, kernel: Kernel) -> None:
    """Prove that the weights of an attention class are those its features are made of."""
    module, x = _build(cls, dim=_DIM, num_heads=_HEADS, qkv_bias=True), _tokens()
    for xformers, run in branches(forward).items():
        contract.check_reads(module, partial(run, module, x))
        weights = _weights(module, x, kernel, xformers)
        _require_equal(cls, "proj(weights @ v)", _features(module, x, weights), run(module, x))
        takes_bias = xformers or not is_gated(forward)
        if takes_bias and "attn_bias" in contract.argument_names(forward):
            bias = _randn(len(x), _HEADS, _TOKENS, _TOKENS)
            weights = _weights(module, x, kernel, xformers, bias)
            output = run(module, x, attn_bias=bias)
            _require_equal(cls, "attention under a bias", _features(module, x, weights), output)
    weights = _weights(module, x, kernel, None)
    _require_equal(cls, "the weights returned", grafted(module, x, return_attn=True), weights)
    if "is_causal" in contract.argument_names(forward):
        causal = grafted(module, x, True, return_attn=True)
        _require_equal(
            cls, "causal attention", _features(module, x, causal), forward(module, x, True)
        )


def prove_at_kernel(cls: type, forward: Forward) -> None:
    """Prove that an attention class calls one kernel once, and what that kernel makes.

    A class that cannot be built or run small is proved in the first pass of each module.
    """
    calls: list[KernelCall] = []
    try:
        module = _build(cls, dim=_DIM, num_heads=_HEADS)
        with Capture(module, calls.append) as capture:
            branches(forward)[flag_of(forward)](module, _tokens())
    except Exception:  # foreign code may raise anything
        return
    if capture.calls != 1:
        raise no_kernel(cls, f"{capture.calls} calls" if capture.calls else "none in a pass")
    calls[0].check(name_of(cls))


def no_kernel(cls: type, found: str) -> IncompatibleUpstreamError:
    """Return the error for an attention class that does not call one kernel once."""
    return IncompatibleUpstreamError(
        f"{name_of(cls)} to call one kernel once in a pass: {SEEN_KERNELS}",
        found,
        "Weights made by exp and a sum, by flex_attention, or inside a custom operator cannot be "
        "seen. This class keeps its own code.",
    )


def prove_block(
    cls: type, forward: Forward, grafted: Forward, child: str, options: dict[str, Any]
) -> None:
    """Prove that a block's weights are those of what it hands to its attention ``child``."""
    module = _build(cls, dim=_DIM, num_heads=_HEADS, **options)
    calls = _calls_of([getattr(module, child)], lambda: forward(module, _tokens()))
    _one_call_each(cls, calls, 1)
    expected = getattr(module, child)(*calls[0], return_attn=True)
    asked = grafted(module, _tokens(), return_attention=True)
    _require_equal(cls, "the attention of a block", asked, expected)


def prove_transformer(cls: type, options: dict[str, Any]) -> None:
    """Prove that a model's weights, flat and chunked, are those of its own forward pass."""
    for chunks in (0, 2):
        model = _build(cls, **_MODEL, block_chunks=chunks, **options)
        images = _randn(2, 3, _GRID[0] * _PATCH, _GRID[1] * _PATCH)
        attentions = [m for m in model.modules() if role_of_module(m) is Role.ATTENTION]
        calls = _calls_of(attentions, partial(model.forward_features, images))
        _one_call_each(cls, calls, _MODEL["depth"])
        expected = [m(*call, return_attn=True) for m, call in zip(attentions, calls, strict=True)]
        for own in expected:
            _layout_fits(cls, model, tokens=own.shape[-1])
        for asked, own in zip(model.get_self_attention(images), expected, strict=True):
            _require_equal(cls, "the attention of a model", asked, own)
        _places_fit(cls, model, images, attentions[:1], calls[0][0])


_MODEL: dict[str, Any] = {
    "img_size": 2 * _PATCH,
    "patch_size": _PATCH,
    "embed_dim": _DIM,
    "depth": 2,
    "num_heads": _HEADS,
    "mlp_ratio": 1,
    "num_register_tokens": 3,
}


def _build(cls: type, **options: Any) -> Any:
    """Build a small ``cls`` in float64 with parameters of order one, in evaluation mode.

    Options that a revision does not have (registers) are left out.
    """
    known = contract.options_of(cls)
    module: Any = cls(**{name: value for name, value in options.items() if name in known})
    # One seed for each: equal layers would hide that two were mixed up.
    for seed, parameter in enumerate(module.double().eval().parameters()):
        parameter.copy_(_randn(*parameter.shape, seed=seed) / 2)
    return module


def _randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _tokens() -> Tensor:
    return _randn(3, _TOKENS, _DIM)


def _weights(
    module: Any, x: Tensor, kernel: Kernel, xformers: bool | None, bias: Tensor | None = None
) -> Tensor:
    query, key, _ = project(module, x)
    scale = kernel.scale(module, query.shape[-1], xformers=xformers)
    return attention_weights(query, key, scale, bias=bias)


def _features(module: Any, x: Tensor, weights: Tensor) -> Any:
    _, _, value = project(module, x)
    return module.proj((weights @ value).transpose(1, 2).flatten(2))


def _calls_of(modules: list[Any], run: Callable[[], object]) -> list[tuple[Any, ...]]:
    """Run, and return the positional arguments with which each of ``modules`` was called."""
    calls: list[tuple[Any, ...]] = []
    hooks = [m.register_forward_pre_hook(lambda _, args: calls.append(args)) for m in modules]
    run()
    for hook in hooks:
        hook.remove()
    return calls


def _require_equal(cls: type, what: str, ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        gap = f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
    elif torch.allclose(ours, theirs, _TOLERANCE, _TOLERANCE):
        return
    else:
        gap = f"a difference of {(ours - theirs).abs().max():.2g}"
    raise IncompatibleUpstreamError(
        f"{what} to equal what {name_of(cls)} itself computes, within {_TOLERANCE:g} in float64",
        gap,
        "Its attention is not softmax(q kᵀ · scale) of its own projection, so its weights are "
        "taken at its kernel.",
    )


def _one_call_each(cls: type, calls: list[tuple[Any, ...]], expected: int) -> None:
    if len(calls) != expected:
        raise IncompatibleUpstreamError(
            f"{name_of(cls)} to call its attention {expected} times in one pass",
            f"{len(calls)} calls",
            "Its forward pass is not upstream's, so its weights are taken at its kernel.",
        )


def _layout_fits(cls: type, model: Any, tokens: int) -> None:
    backbone, patches = Backbone(model), _GRID[0] * _GRID[1]
    if tokens != backbone.prefix + patches:
        raise IncompatibleUpstreamError(
            f"{name_of(cls)} to lay out 1 CLS + {backbone.registers} registers + {patches} patches",
            f"{tokens} tokens",
            "Rows may be other tokens, so its weights are taken at its kernel.",
        )


def _places_fit(cls: type, model: Any, images: Tensor, first: list[Any], tokens: Tensor) -> None:
    """Change the pixels of the first and the last patch, and see which tokens change."""
    changed = images.clone()
    changed[:, :, :_PATCH, :_PATCH] += 1
    changed[:, :, -_PATCH:, -_PATCH:] += 1
    (args,) = _calls_of(first, partial(model.forward_features, changed))
    gaps = (args[0] - tokens).abs().amax(-1).amax(0)
    found = (gaps > _TOLERANCE).nonzero().flatten().tolist()
    prefix = Backbone(model).prefix
    if found != (expected := [prefix, prefix + _GRID[0] * _GRID[1] - 1]):
        raise IncompatibleUpstreamError(
            f"{name_of(cls)} to have its first and last patch at positions {expected}",
            f"them at {found}",
            "Rows may be other tokens, so its weights are taken at its kernel.",
        )
