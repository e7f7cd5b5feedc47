"""Everything about xFormers: upstream's switches, its kernel, nested lists and the fallback.

Each module of upstream sets ``XFORMERS_AVAILABLE`` at import, by itself. So attention and block
can disagree: one import failed, or one flag was changed. ``XFORMERS_DISABLED`` in the environment
counts at import only, and only in revisions that know it.

xFormers counts as available if it can be imported, whatever the device. On a CPU its kernel then
raises "No operator found". The fallback starts with that error, and PyTorch's kernel runs instead.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_attn._compat import is_compiling
from dinov2_attn.errors import InvalidInputError, KernelFallbackWarning, NoOperatorError
from dinov2_attn.kernels.call import FusedCall
from dinov2_attn.kernels.capture import current_capture, shape_of_output
from dinov2_attn.math.bias import dense, groups, is_block_diagonal, is_known, unknown
from dinov2_attn.typing import Forward

FLAG = "XFORMERS_AVAILABLE"
KERNEL = "memory_efficient_attention"


def is_gated(forward: Forward) -> TypeGuard[FunctionType]:
    """Return whether ``forward`` itself reads the flag."""
    return (
        isinstance(forward, FunctionType)
        and FLAG in forward.__code__.co_names
        and FLAG in forward.__globals__
    )


def flag_of(forward: Forward) -> bool:
    """Return whether ``forward`` would call xFormers now. Without the flag it never does."""
    return is_gated(forward) and bool(forward.__globals__[FLAG])


def describe_flags(forward: FunctionType) -> str:
    """Return the value of each flag in the package of ``forward``, as a message gives them."""
    package = forward.__globals__["__name__"].rpartition(".")[0]
    flags = [
        f"{name}.{FLAG} is {vars(module)[FLAG]}"
        for name, module in sys.modules.copy().items()
        if name.startswith(f"{package}.") and FLAG in getattr(module, "__dict__", ())
    ]
    environment = "set" if "XFORMERS_DISABLED" in os.environ else "not set"
    return ", ".join([*sorted(flags), f"XFORMERS_DISABLED is {environment}"])


class Kernel:
    """The kernel inside an attention class's own ``forward``.

    Explicit code of upstream multiplies by ``module.scale``. The fused kernels of PyTorch and
    xFormers do not see that attribute and use ``head_dim ** -0.5``. The two agree until the
    attribute is changed. Then only the choice of the kernel gives the attention that the features
    were made of. The proof measures it.

    Args:
        forward: The class's own ``forward``.
        honours_scale: Whether it reads ``module.scale``, without xFormers and with it.

    """

    def __init__(self, forward: Forward, honours_scale: dict[bool, bool]) -> None:
        self._forward = forward
        self._honours_scale = honours_scale

    def scale(self, module: Any, head_dim: int, *, xformers: bool | None = None) -> float:
        """Return the factor on ``query @ keyᵀ``, by default for the branch that would run now."""
        if xformers is None:
            xformers = flag_of(self._forward)
        if self._honours_scale[xformers]:
            return float(module.scale)
        return 1 / math.sqrt(head_dim)

    def check_bias(self, bias: object) -> None:
        """Raise ``InvalidInputError`` unless ``forward`` has a kernel that takes this ``bias``."""
        if not is_known(bias):
            raise unknown(bias)
        if is_gated(self._forward) and not flag_of(self._forward):
            raise InvalidInputError(
                f"no attn_bias, which this attention takes only where its module's {FLAG} is true",
                f"one of type {type(bias).__name__}, where {describe_flags(self._forward)}",
                "Leave it out, or install xFormers and import upstream without XFORMERS_DISABLED.",
            )
        if not (is_gated(self._forward) or isinstance(bias, Tensor)):
            raise InvalidInputError(
                "attn_bias as a dense tensor: this class hands it to PyTorch's kernel",
                f"one of type {type(bias).__name__}",
                "Use MemEffAttention, or pass attn_bias.materialize(...).",
            )


def kernel_namespace(forward: Forward) -> dict[str, Any] | None:
    """Return the globals where ``forward`` finds xFormers' kernel, ``None`` if it uses none.

    They are those of its own module, or of xFormers' if it asks that by its name.
    """
    forward = inspect.unwrap(forward)
    if not isinstance(forward, FunctionType) or KERNEL not in forward.__code__.co_names:
        return None
    if KERNEL in forward.__globals__:
        return forward.__globals__
    ops = sys.modules.get("xformers.ops")
    return None if is_gated(forward) else getattr(ops, "__dict__", None)


def runs_nested(block: nn.Module) -> bool:
    """Return whether upstream's code would run ``block`` on a list, all tensors in one.

    Both flags must be true: the block nests, and its attention takes the nested bias.
    """
    attention = getattr(block, "attn", None)
    return _flag_of_module(block) and attention is not None and _flag_of_module(attention)


def can_nest(model: Any, blocks: Iterable[nn.Module], images: Sequence[Tensor]) -> bool:
    """Return whether upstream would run ``images`` through ``blocks`` in one, and could.

    Its masks cannot describe a batch without samples.
    """
    takes_lists = hasattr(model, "forward_features_list")
    return takes_lists and all(map(len, images)) and all(map(runs_nested, blocks))


def check_stochastic_depth(block: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Raise ``NoOperatorError`` if ``block`` would drop samples of a nested list without a GPU.

    Upstream selects and adds them by ``index_select_cat`` and ``scaled_index_add``, which
    xFormers has for CUDA only.
    """
    ratio = getattr(block, "sample_drop_ratio", 0.0)
    devices = {tensor.device.type for tensor in tensors}
    if block.training and ratio > 0 and runs_nested(block) and devices != {"cuda"}:
        raise NoOperatorError(
            "nested tensors on a CUDA device, or no stochastic depth: in training upstream drops "
            "samples of a list with operators that xFormers has for CUDA only",
            f"a list on {', '.join(sorted(devices))} in training, with a drop path of {ratio:g}",
            "Call model.eval(), build with drop_path_rate=0, or ask tensor by tensor.",
        )


def graft_captured_kernel(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``memory_efficient_attention`` report its call to the capture of this thread.

    Args:
        original: xFormers' kernel, as the module of an attention class holds it.

    Returns:
        The function that replaces that name.

    """

    @functools.wraps(original, updated=())
    def memory_efficient_attention(*args: Any, **kwargs: Any) -> Any:
        capture = current_capture()
        if capture is None:
            return original(*args, **kwargs)
        call = _fused_call(*args, **kwargs)
        shape = shape_of_output(*args, **kwargs)
        return capture.ran(
            call,
            lambda: original(*args, **kwargs),
            _heads_first,
            lambda out: out.transpose(1, 2).reshape(shape),
        )

    return memory_efficient_attention


def graft_kernel(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give ``memory_efficient_attention`` a fallback to ``scaled_dot_product_attention``.

    If xFormers finds an operator, its result is returned bit for bit. If it finds none, PyTorch
    computes the same attention, and one ``KernelFallbackWarning`` gives the reason. A
    block-diagonal bias is computed group by group (Σ n²). Other errors of xFormers are raised.

    Args:
        original: xFormers' kernel, as the module of ``MemEffAttention`` holds it.

    Returns:
        The function that replaces that name. It reports its call too.

    """
    warned: list[str] = []

    @functools.wraps(original, updated=())
    def with_fallback(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except (NotImplementedError, ValueError) as error:
            call = _call(*args, **kwargs)
            if call is None or not _finds_no_operator(error, call["query"]):
                raise
            reason = str(error).partition("\n")[0].removesuffix(" with inputs:").rstrip(":")
        if not warned and not is_compiling():  # a warning would break the graph
            warned.append(reason)
            _warn(call["query"], reason)
        return _attend(**call)

    return graft_captured_kernel(with_fallback)


def kernel_homes() -> list[dict[str, Any]]:
    """Return the globals of every module that holds xFormers' kernel by its name."""
    return _kernel_homes(len(sys.modules)) if "xformers" in sys.modules else []


@functools.lru_cache(maxsize=1)
def _kernel_homes(modules: int) -> list[dict[str, Any]]:
    """Search once for a number of ``modules``: a search takes half a millisecond."""
    del modules
    found = (getattr(module, "__dict__", {}) for module in sys.modules.copy().values())
    return [names for names in found if callable(names.get(KERNEL))]


def _flag_of_module(module: nn.Module) -> bool:
    # The first forward that reads the flag: a subclass may extend upstream's and call it.
    forwards = (vars(base)["forward"] for base in type(module).__mro__ if "forward" in vars(base))
    for forward in map(inspect.unwrap, forwards):
        if is_gated(forward):
            return flag_of(forward)
    return False


def _call(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: object = None,
    **others: object,
) -> dict[str, Any] | None:
    """Return the arguments by xFormers' names, ``None`` if PyTorch could not run the call."""
    known = attn_bias is None or is_known(attn_bias)
    if others or not known or query.ndim != 4 or key.shape[:3] != value.shape[:3]:
        return None
    inputs = {"query": query, "key": key, "value": value}
    return {**inputs, "bias": attn_bias, "dropout": p, "scale": scale}


def _fused_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    **_: object,
) -> FusedCall:
    """Return the call of xFormers' kernel with these arguments, ``(B, N, heads, d)`` each."""
    query, key, value = map(_heads_first, (query, key, value))
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    return FusedCall(KERNEL, query, key, value, scale, attn_bias, dropout=p)


def _heads_first(tensor: Tensor) -> Tensor:
    """Return ``(B, N, heads, d)``, ``(B, N, d)`` or ``(B, N, groups, heads, d)`` by heads."""
    if tensor.ndim == 3:
        return tensor[:, None]
    return tensor.flatten(2, -2).transpose(1, 2)


def _finds_no_operator(error: Exception, query: Tensor) -> bool:
    if isinstance(error, NotImplementedError):  # as documented
        return True
    message = str(error)
    # Upstream's first revision names an operator, and a GPU's mask may meet a model on the CPU.
    elsewhere = query.device.type == "cpu" and "Attention bias and Query/Key/Value" in message
    return elsewhere or "does not support inputs" in message


def _warn(query: Tensor, reason: str) -> None:
    kind = f"{str(query.dtype).removeprefix('torch.')} on {query.device.type}"
    warnings.warn(
        f"xFormers has no operator for attention in {kind}, so PyTorch's "
        f"scaled_dot_product_attention computes it from here on (xFormers: {reason}). "
        "install(fallback=False) leaves that out.",
        KernelFallbackWarning,
        stacklevel=_frames_of_ours(),
    )


def _frames_of_ours() -> int:
    """Return the ``stacklevel`` of the line outside of this package that called."""
    here = __name__.partition(".")[0]
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(here):
        frame, level = frame.f_back, level + 1
    return level


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Any, dropout: float, scale: float | None
) -> Tensor:
    if scale is not None:  # PyTorch before 2.1 has no argument for it
        query = query * (scale * math.sqrt(query.shape[-1]))
    if not is_block_diagonal(bias):
        if bias is not None:
            shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
            bias = dense(bias, shape, query.device, query.dtype)
        return _fused(query, key, value, bias, dropout)
    parts = []
    for group in groups(bias, query, query.dtype):
        own = group.split(query, group.queries)
        theirs = [group.split(tensor, group.keys) for tensor in (key, value)]
        parts.append(_fused(own, theirs[0], theirs[1], group.mask, dropout).flatten(0, 1))
    return torch.cat(parts)[None]


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """Call PyTorch's kernel on ``(B, N, heads, head_dim)``."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2)
