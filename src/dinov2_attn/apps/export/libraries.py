"""The libraries that an export needs, asked for before torch is imported."""

from __future__ import annotations

from dinov2_attn._imports import is_installed
from dinov2_attn.errors import UnavailableError

WRITING, CHECKING = ("onnx", "onnxscript"), ("onnxruntime",)


def require_libraries(check: bool) -> None:
    """Raise ``UnavailableError`` if a library is missing to write files, and to ``check`` them."""
    for name in (*WRITING, *(CHECKING if check else ())):
        if not is_installed(name):
            raise UnavailableError(
                "the libraries that write and check ONNX files",
                f"no {name} in this environment",
                "Install them with `pip install 'dinov2-attn[onnx]'`.",
            )
