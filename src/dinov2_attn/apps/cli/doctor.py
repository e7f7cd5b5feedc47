"""``dinov2-attn doctor``: report what is installed, what works on a device, what would fail."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

from dinov2_attn.apps.cli.argtypes import add_source_and_device
from dinov2_attn.apps.cli.report import say

# Between projection and kernel `(B, N, heads, head_dim)`: small, with the head_dim of every DINOv2.
_SHAPE = (1, 16, 2, 64)
_LIBRARIES = ("torchvision", "matplotlib", "PIL", "tqdm", "safetensors", "filelock")
_DTYPES = ("float32", "bfloat16", "float16")


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "doctor",
        help="Report what is installed, recognised and supported here.",
        description="Check PyTorch, xFormers and upstream's code in this environment, install "
        "the grafts, and report what works on the device and what would fail. The first line is "
        "the verdict. The exit status "
        "is 0 if the grafts can be installed, and 2 if not.",
        epilog="Example: dinov2-attn doctor --repo path/to/dinov2 --device cuda",
    )
    add_source_and_device(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the verdict, then one line for each finding."""
    import dinov2_attn
    from dinov2_attn.apps.cli.model_options import check_device
    from dinov2_attn.apps.weights.source import obtain

    check_device(args.device)
    warnings.simplefilter("ignore")  # upstream warns at import of what is reported here
    source = obtain(args.repo)
    dinov2_attn.install()
    importlib.import_module("dinov2.models.vision_transformer")
    kernels = dict(_kernels(args.device))
    say(args, _verdict(kernels, args.device))
    say(args, _versions())
    say(args, str(source))
    say(args, str(dinov2_attn.status()))
    say(args, _flags())
    for name, problem in kernels.items():
        say(args, f"{name} on {args.device}: {problem or 'works'}")
    for line in _would_fail(kernels):
        say(args, f"would fail: {line}")
    return 0


def _verdict(kernels: dict[str, str], device: str) -> str:
    """Return whether commands work here, and what does not."""
    works = [name for name in _DTYPES if not kernels[f"PyTorch's kernel, {name}"]]
    if "float32" not in works:
        return f"NOT OK: PyTorch's kernel does not run in float32 on {device}. See below."
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"OK in Python on {device}. Commands lack {', '.join(missing)}: "
            "run `pip install 'dinov2-attn[viz]'`."
        )
    return (
        f"OK: demo, heatmap, figure, explore and extract work on {device} in {', '.join(works)}. "
        "Try: dinov2-attn demo -o out"
    )


def _versions() -> str:
    names = ("dinov2-attn", "torch", "torchvision", "xformers", "numpy")
    versions = {name: _version(name) for name in names}
    found = [f"{name} {v}" if v else f"no {name}" for name, v in versions.items()]
    return ", ".join([f"python {platform.python_version()}", *found])


def _flags() -> str:
    from dinov2_attn.kernels.xformers import describe_flags

    attention = sys.modules["dinov2.layers.attention"]
    return describe_flags(inspect.unwrap(attention.MemEffAttention.forward))


def _kernels(device: str) -> Iterator[tuple[str, str]]:
    """Yield the name of each kernel and why it fails; the reason is empty if it works.

    Each kernel is run, since the operators of a library depend on its build.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    dtypes = [getattr(torch, name) for name in _DTYPES]
    tensors = [torch.ones(_SHAPE, device=device, dtype=dtype) for dtype in dtypes]
    for name, x in zip(_DTYPES, tensors, strict=True):
        yield f"PyTorch's kernel, {name}", _try(scaled_dot_product_attention, x, x, x)
    try:
        ops = importlib.import_module("xformers.ops")
    except ImportError as error:
        yield "xFormers", f"{type(error).__name__}: {error}"
        return
    bias = ops.fmha.BlockDiagonalMask.from_seqlens([7, 9])
    kernel = ops.memory_efficient_attention
    for name, x in zip(_DTYPES, tensors, strict=True):
        yield f"xFormers' kernel, {name}", _try(kernel, x, x, x)
        yield f"xFormers' nested kernel, {name}", _try(kernel, x, x, x, bias)
    sample, place = tensors[0].flatten(1), torch.tensor([0], device=device)
    yield "xFormers' stochastic depth", _try(ops.index_select_cat, [sample], [place])


def _try(call: Callable[..., Any], *arguments: object) -> str:
    try:
        call(*arguments)
    except Exception as error:  # any exception of a kernel is the finding
        first = str(error).partition("\n")[0].removesuffix(" with inputs:")
        return f"{type(error).__name__}: {first[:150]}"
    return ""


def _would_fail(kernels: dict[str, str]) -> Iterator[str]:
    from dinov2_attn.kernels.xformers import FLAG

    layers = [sys.modules[f"dinov2.layers.{name}"] for name in ("attention", "block")]
    attention, block = (bool(getattr(module, FLAG)) for module in layers)
    lacking = [n for n, problem in kernels.items() if problem and n.startswith("xFormers' kernel")]
    if attention and lacking:
        dtypes = ", ".join(name.rpartition(" ")[2] for name in lacking)
        yield f"upstream's forward in {dtypes} without install(), which adds a fallback"
    if not (attention and block):
        yield "upstream's own forward of a list; with return_attention its entries run one by one"
    elif kernels.get("xFormers' stochastic depth"):
        yield "lists in training with a drop path above 0 (NoOperatorError); anything else runs"
    for name, problem in kernels.items():
        if name.startswith("PyTorch's") and problem:
            yield f"everything in {name.rpartition(' ')[2]}"
    model = sys.modules["dinov2.models.vision_transformer"].DinoVisionTransformer
    if "num_register_tokens" not in inspect.signature(model).parameters:
        yield "models with registers: this revision of upstream has none"
    if attention and _version("xformers") == "0.0.18":
        yield "more than 32,768 tokens: xFormers 0.0.18 returns NaN (it is the one upstream pins)"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
