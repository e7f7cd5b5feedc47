"""The libraries that an export needs, asked for before torch is imported."""

from __future__ import annotations

import importlib.util

from dinov2_attn.errors import UnavailableError

WRITING, CHECKING = ("onnx", "onnxscript"), ("onnxruntime",)


def require_libraries(check: bool) -> None:
    """Raise ``UnavailableError`` if a library is missing to write files, and to ``check`` them."""
    for name in (*WRITING, *(CHECKING if check else ())):
        if importlib.util.find_spec(name) is None:
            raise UnavailableError(
                "the libraries that write and check ONNX files",
                f"no {name} in this environment",
                "Install them with `pip install 'dinov2-attn[onnx]'`.",
            )
