"""One target: its truth, its answer, and the difference between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.tolerances import same_bits
from tests.wild.answer import answer
from tests.wild.target import Target
from tests.wild.truth import KernelCall, attention_of

# Largest difference of a weight, which is at most 1. The engine keeps the kernel's dtype.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
# The mean of the rows' largest weights, times their length: 1 for uniform attention.
SHARP = 2.0


@dataclass
class Report:
    """What one run found. ``verdict`` says it in a few words."""

    name: str
    project: str
    revision: str
    differs: str
    verdict: str = ""
    calls: int = 0
    kernels: list[str] = field(default_factory=list)
    sharpness: float = 0.0
    truth_error: float = 0.0
    features_identical: bool | None = None
    layers: dict[str, float] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def is_equal(self) -> bool:
        """Whether every call was answered, rightly, and the features kept their bits."""
        return self.verdict.startswith("equal to ")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def report_on(target: Target) -> Report:
    """Build ``target``, run it three times and compare."""
    source = target.source
    report = Report(target.name, source.project, source.revision, target.differs)
    try:
        torch.manual_seed(0)
        model = target.build()
        with torch.no_grad():
            features = tensors_in(target.run(model))
            again = tensors_in(target.run(model))
            truth = attention_of(model, target.run)
    except Exception as error:
        return _failed(report, "cannot be built here", error)
    _describe_truth(report, truth)
    if report.sharpness < SHARP or not _identical(features, again):
        report.verdict = "cannot be judged: attention is not sharp, or two runs differ"
        return report
    try:
        with torch.no_grad():
            answered, recorded = _answered(model, target.run)
    except Exception as error:
        return _failed(report, "refused", error)
    report.features_identical = _identical(features, recorded)
    compare(report, truth, answered)
    return report


def _answered(
    model: nn.Module, run: Callable[[nn.Module], Any]
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    features: list[Tensor] = []

    def run_and_keep(model: nn.Module) -> Any:
        out = run(model)
        features.extend(tensors_in(out))
        return out

    return answer(model, run_and_keep), features


def _identical(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) > 0 and same_bits(ours, theirs)


def _describe_truth(report: Report, truth: list[KernelCall]) -> None:
    report.calls = len(truth)
    report.kernels = sorted({call.kernel for call in truth})
    report.truth_error = max((call.error for call in truth), default=0.0)
    peaks = [float(c.weights.amax(-1).mean()) * c.weights.shape[-1] for c in truth]
    report.sharpness = min(peaks, default=0.0)


def compare(report: Report, truth: list[KernelCall], answered: dict[str, list[Tensor]]) -> None:
    """Give each kernel call the next answer of the module that it ran in."""
    left = {path: list(weights) for path, weights in answered.items()}
    right = True
    for call in truth:
        path = _owner(call, left)
        if path is None:
            report.missed.append(call.path)
            continue
        ours = left[path].pop(0)
        difference = _difference(ours, call.weights)
        report.layers[path] = max(difference, report.layers.get(path, 0.0))
        right &= difference <= TOLERANCES[ours.dtype]
    surplus = sum(map(len, left.values()))
    report.verdict = _verdict(report, right, surplus)


def _verdict(report: Report, right: bool, surplus: int) -> str:
    largest = max(report.layers.values(), default=0.0)
    if not right:
        return f"WRONG by {largest:.1e}"
    if surplus:
        return f"WRONG: {surplus} answers without a kernel call"
    if not report.features_identical:
        return "WRONG: features changed"
    if len(report.missed) == report.calls:
        return "WRONG: no call was answered, and nothing was said"
    if report.missed:
        answered = report.calls - len(report.missed)
        return f"in part: {answered} of {report.calls} calls, these equal to {largest:.0e}"
    return f"equal to {largest:.0e}"


def _owner(call: KernelCall, left: dict[str, list[Tensor]]) -> str | None:
    """Return the module whose next answer has the call's shape, and which it ran in or contains.

    A kernel may run outside the forward of the module that is asked about: then that module lies
    inside the one that ran.
    """
    fitting = [path for path, weights in left.items() if weights and _fits(weights[0], call)]
    around = [path for path in fitting if _contains(path, call.path)]
    inside = [path for path in fitting if _contains(call.path, path)]
    return max(around, key=len) if around else next(iter(inside), None)


def _contains(outer: str, inner: str) -> bool:
    return not outer or inner == outer or inner.startswith(f"{outer}.")


def _fits(ours: Tensor, call: KernelCall) -> bool:
    same_end = ours.shape[-2:] == call.weights.shape[-2:]
    return same_end and ours.numel() == call.weights.numel()


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.reshape(ours.shape)).abs().max())


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of nested lists, tuples, mappings and objects, in their order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in tensors_in(part)]
    return tensors_in(vars(value)) if hasattr(value, "__dict__") and value is not None else []


def _failed(report: Report, what: str, error: Exception) -> Report:
    report.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
    found = getattr(error, "found", None)  # the part of our own errors that says most
    report.verdict = f"{what}: {' '.join(str(found).split()) if found else report.error}"
    return report
