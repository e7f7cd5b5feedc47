"""The attention of DINOv2, proven right.

>>> import dinov2_attn
>>> handle = dinov2_attn.install()

From here on upstream's own models answer ``get_self_attention``,
``get_last_self_attention`` and ``return_attention=True``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dinov2_attn import errors
from dinov2_attn._imports import lazily
from dinov2_attn.errors import Dinov2AttnError
from dinov2_attn.grafting.api import Handle, Status, install, status, uninstall

if TYPE_CHECKING:
    from dinov2_attn import viz
    from dinov2_attn.apps.export.onnx import OnnxExport, export_onnx
    from dinov2_attn.apps.extraction.extract import extract
    from dinov2_attn.apps.extraction.read import AttentionDataset
    from dinov2_attn.apps.training.lightning import lightning_callback
    from dinov2_attn.apps.training.logger import AttentionLogger
    from dinov2_attn.apps.weights.checkpoints import load_checkpoint
    from dinov2_attn.grafting.grafted import grafted
    from dinov2_attn.maps.add_registers import add_registers
    from dinov2_attn.maps.artifacts import ArtifactTokens
    from dinov2_attn.maps.attention_maps import AttentionMaps
    from dinov2_attn.maps.edit import edit
    from dinov2_attn.maps.find_artifacts import artifact_tokens
    from dinov2_attn.maps.find_statistics import statistics
    from dinov2_attn.maps.one_batch import attention_maps
    from dinov2_attn.maps.record import record
    from dinov2_attn.maps.recording import Recording
    from dinov2_attn.maps.register_neurons import RegisterNeurons, find_register_neurons
    from dinov2_attn.maps.relevance import Relevance, relevance
    from dinov2_attn.maps.rollout import rollout
    from dinov2_attn.maps.statistics import Statistics
    from dinov2_attn.maps.targets import token_similarity
    from dinov2_attn.math.buffers import release_memory

__all__ = [
    "ArtifactTokens",
    "AttentionDataset",
    "AttentionLogger",
    "AttentionMaps",
    "Dinov2AttnError",
    "Handle",
    "OnnxExport",
    "Recording",
    "RegisterNeurons",
    "Relevance",
    "Statistics",
    "Status",
    "add_registers",
    "artifact_tokens",
    "attention_maps",
    "edit",
    "errors",
    "export_onnx",
    "extract",
    "find_register_neurons",
    "grafted",
    "install",
    "lightning_callback",
    "load_checkpoint",
    "record",
    "release_memory",
    "relevance",
    "rollout",
    "statistics",
    "status",
    "token_similarity",
    "uninstall",
    "viz",
]

__version__ = "0.1.0"

# What needs torch, which is imported with its first use.
__getattr__, __dir__ = lazily(
    __name__,
    {
        "ArtifactTokens": "dinov2_attn.maps.artifacts",
        "AttentionDataset": "dinov2_attn.apps.extraction.read",
        "AttentionLogger": "dinov2_attn.apps.training.logger",
        "AttentionMaps": "dinov2_attn.maps.attention_maps",
        "OnnxExport": "dinov2_attn.apps.export.onnx",
        "Recording": "dinov2_attn.maps.recording",
        "RegisterNeurons": "dinov2_attn.maps.register_neurons",
        "Relevance": "dinov2_attn.maps.relevance",
        "Statistics": "dinov2_attn.maps.statistics",
        "add_registers": "dinov2_attn.maps.add_registers",
        "artifact_tokens": "dinov2_attn.maps.find_artifacts",
        "attention_maps": "dinov2_attn.maps.one_batch",
        "edit": "dinov2_attn.maps.edit",
        "export_onnx": "dinov2_attn.apps.export.onnx",
        "extract": "dinov2_attn.apps.extraction.extract",
        "find_register_neurons": "dinov2_attn.maps.register_neurons",
        "grafted": "dinov2_attn.grafting.grafted",
        "lightning_callback": "dinov2_attn.apps.training.lightning",
        "load_checkpoint": "dinov2_attn.apps.weights.checkpoints",
        "record": "dinov2_attn.maps.record",
        "relevance": "dinov2_attn.maps.relevance",
        "release_memory": "dinov2_attn.math.buffers",
        "rollout": "dinov2_attn.maps.rollout",
        "statistics": "dinov2_attn.maps.find_statistics",
        "token_similarity": "dinov2_attn.maps.targets",
        "viz": "dinov2_attn.viz",
    },
)
