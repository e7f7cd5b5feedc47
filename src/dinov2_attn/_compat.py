"""The names of torch and CPython that differ by version, and the private ones of these.

Each function has one job, so that a new version of torch is followed in this file alone.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import _disable_current_modes

F = TypeVar("F", bound=Callable[..., Any])

# Whether PyTorch's kernel returns zeros for a row that a bias masks completely. It does from
# torch 2.5 on, where this function came in. Before, such a row is NaN.
MASKED_ROWS_ARE_ZERO = hasattr(torch, "_safe_softmax")

# Whether a product of half precision can have float32. On CUDA it can from torch 2.8 on.
BMM_HAS_OUT_DTYPE = hasattr(torch.ops.aten.bmm, "dtype_out")

# In torch 2.0, gloo often hangs when three processes destroy their group.
CAN_DESTROY_GLOO = torch.__version__.split(".")[:2] != ["2", "0"]


def is_compiling() -> bool:
    """Return whether Dynamo traces this call."""
    # torch.compiler exists from torch 2.1 on, and its is_compiling from 2.2 on.
    compiler: Any = getattr(torch, "compiler", None)
    if hasattr(compiler, "is_compiling"):
        return bool(compiler.is_compiling())
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and bool(dynamo.is_compiling())


def is_tracing() -> bool:
    """Return whether Dynamo traces this call. An export in another thread is none of it."""
    # torch.compiler has it from torch 2.2 on.
    compiler: Any = getattr(torch, "compiler", None)
    if hasattr(compiler, "is_dynamo_compiling"):
        return bool(compiler.is_dynamo_compiling())
    return is_compiling()


def constant_in_graphs(function: F) -> F:
    """Let Dynamo call ``function`` while it traces, and take what it returns for a constant."""
    # What torch._dynamo.assume_constant_result does in every version; importing that takes long.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_transformed() -> bool:
    """Return whether Dynamo or a transform of torch.func (vmap, grad, …) traces this call."""
    # No version has a public function for the second.
    return is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def is_autocast_on(device_type: str) -> bool:
    """Return whether autocast is on in this thread for ``"cpu"`` or ``"cuda"``."""
    # torch before 2.4 has a function for each.
    if _ASKS_BY_DEVICE:
        return torch.is_autocast_enabled(device_type)
    asked: Any = (
        torch.is_autocast_cpu_enabled if device_type == "cpu" else torch.is_autocast_enabled
    )
    return bool(asked())


_ASKS_BY_DEVICE = hasattr(torch.amp, "is_autocast_available")


def is_traced() -> bool:
    """Return whether ``torch.jit.trace`` records this call."""
    # Every version. torch.jit.is_tracing() asks the same, but has no types.
    return torch._C._get_tracing_state() is not None


def version_of(tensor: Tensor) -> int | None:
    """Return how often ``tensor`` was written in place, if PyTorch counts it."""
    # Every version. Inference tensors have no count.
    return None if tensor.is_inference() else tensor._version


def has_tangents() -> bool:
    """Return whether forward-mode differentiation is active, which ``no_grad`` does not stop."""
    # No version has a public function for it.
    return forward_ad._current_level >= 0


def is_in_backward() -> bool:
    """Return whether this thread is in a backward pass, as checkpointing's second run is."""
    # No version has a public function for it.
    return torch._C._current_graph_task_id() != -1


def without_modes() -> AbstractContextManager[object]:
    """Switch off the modes around a call, such as ``FakeTensorMode``."""
    # No version has a public function for it.
    modes: AbstractContextManager[object] = _disable_current_modes()
    return modes


def is_foreign_thread() -> bool:
    """Return whether Python did not start this thread, as those of autograd on a GPU."""
    # Every version. There is no public name for it.
    return isinstance(threading.current_thread(), threading._DummyThread)


def backward_pass() -> int:
    """Return the number of the backward pass of this thread. A later one has a larger number."""
    # No version has a public function for it.
    return int(torch._C._current_graph_task_id())


def after_backward(call: Callable[[], None]) -> None:
    """Let ``call`` run at the end of the backward pass of this thread, unless that fails."""
    # Every version. FSDP and DDP use it, and there is no public name for it.
    torch.autograd.Variable._execution_engine.queue_callback(call)


def raised_by_dynamo(error: BaseException) -> bool:
    """Return whether Dynamo wrapped ``error`` in one of its own."""
    # By name: importing torch._dynamo takes seconds. Every version has these errors there.
    return type(error).__module__ == "torch._dynamo.exc"


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``torch.compile`` made ``module``, or ``module.compile()`` was called."""
    # By name: importing torch._dynamo takes seconds. The attribute came in with torch 2.2.
    if type(module).__module__ == "torch._dynamo.eval_frame":
        return True
    return getattr(module, "_compiled_call_impl", None) is not None


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP holds a part of ``model``, of its first or its second generation."""
    # By name: importing torch.distributed.fsdp takes a second, and FSDP2 came in with torch 2.4.
    return any("FSDP" in base.__name__ for m in model.modules() for base in type(m).__mro__)


def storage_of(tensor: Tensor) -> int:
    """Return a number that tensors share if they share memory, fake ones too."""
    # Every version. The address of the memory is 0 for all fake tensors.
    return int(tensor.untyped_storage()._cdata)


def submodules(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """Return the submodules of ``module`` by name, without a search."""
    # Every version. named_children() compares each with all others.
    return module._modules


def hooks_of(layer: nn.Module) -> tuple[Mapping[int, object], ...]:
    """Return all hooks that run around the forward of ``layer``, global ones included."""
    # No version has a public way to read them.
    return (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
    )


@contextmanager
def grad_mode_kept() -> Iterator[None]:
    """Restore grad mode if ``KeyboardInterrupt`` leaves the block.

    It may have come while PyTorch's own context managers were restoring it.
    """
    before = torch.is_grad_enabled()
    try:
        yield
    except KeyboardInterrupt:
        if torch.is_grad_enabled() != before:
            torch.set_grad_enabled(before)
        raise


def depth_of_modes() -> int:
    """Return how many ``TorchFunctionMode`` this thread is in."""
    # Every version. There is no public name for it.
    return int(torch._C._len_torch_function_stack())


def records_of_archive(path: Path) -> list[str]:
    """Return the names in a zip file, as PyTorch's own reader finds them."""
    # Every version. Python's zipfile can be made to see other names in the same file.
    return list(torch._C.PyTorchFileReader(str(path)).get_all_records())


def record_of_archive(path: Path, name: str) -> bytes:
    """Return the content of a name in a zip file, as PyTorch's own reader finds it."""
    content: bytes = torch._C.PyTorchFileReader(str(path)).get_record(name)
    return content


def look_at_classes(file: Any) -> bool:
    """Read the next pickle of ``file`` as PyTorch does, without making anything of it.

    Names of classes are read by its ``readline``. Returns False for what is no pickle, and in
    versions that cannot look, which do not search their errors for such names.
    """
    unpickler = importlib.import_module("torch._weights_only_unpickler")
    look = getattr(unpickler, "get_globals_in_pkl", None)  # torch 2.6 and later
    if look is None:
        return False
    try:
        look(file)
    except unpickler.UnpicklingError:
        return False
    return True
