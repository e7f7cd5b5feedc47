"""The part of a training's model whose attention is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from torch import nn

from dinov2_attn._compat import is_compiled, is_sharded
from dinov2_attn.backbone.structure import attention_modules, image_entrances, name_of
from dinov2_attn.errors import InvalidInputError

NAMED = 4


def backbone_of(model: nn.Module, chosen: str | nn.Module | None) -> nn.Module:
    """Return the vision transformer in ``model``, without wrappers of DDP and ``torch.compile``.

    Args:
        model: What is trained: a model, a Lightning module, a student with its teacher.
        chosen: A path in ``model`` such as ``"student.backbone"``, the module itself, or None for
            the only one that cuts images into patches and attends to them.

    Raises:
        InvalidInputError: If there is no such module, or several, or it is sharded.

    """
    found = _chosen(unwrapped(model), chosen)
    if is_sharded(found):
        raise InvalidInputError(
            "a model whose weights are whole in each process",
            f"{name_of(type(found))}, which FSDP holds in parts",
            "One process alone cannot run it. Draw from a checkpoint: dinov2-attn heatmap.",
        )
    return found


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what DataParallel, DistributedDataParallel and ``torch.compile`` wrap."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := vars(module).get("_modules", {}).get("_orig_mod"), nn.Module):
            module = inner
        else:
            return module


def is_compiled_inside(module: nn.Module) -> bool:
    """Return whether ``module`` or a part of it runs as a compiled graph."""
    return any(map(is_compiled, module.modules()))


def _chosen(model: nn.Module, chosen: str | nn.Module | None) -> nn.Module:
    if isinstance(chosen, nn.Module):
        return unwrapped(chosen)
    if chosen is not None:
        return unwrapped(_at(model, chosen))
    found = dict(_candidates(model, ""))
    if len(found) == 1:
        return unwrapped(next(iter(found.values())))
    raise InvalidInputError(
        f"one vision transformer inside {name_of(type(model))}",
        f"{len(found)}: {_some(list(found))}" if found else "none",
        f"Say which: backbone={next(iter(found))!r}."
        if found
        else "Pass the model that is given the images, or backbone= as its path.",
    )


def _at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at ``path``, which may leave wrappers out."""
    module = model
    for name in filter(None, path.split(".")):
        module = unwrapped(module)
        child = dict(module.named_children()).get(name)
        if child is None:
            paths = [found for found, _ in model.named_modules() if found]
            near = get_close_matches(path, paths, 1)
            raise InvalidInputError(
                f"backbone as a path in {name_of(type(model))}",
                repr(path),
                f"Did you mean {near[0]!r}?" if near else f"It has {_some(paths)}.",
            )
        module = child
    return module


def _candidates(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the innermost modules that cut images into patches and attend to them."""
    if not (image_entrances(module) and attention_modules(module)):
        return
    inner = [
        found
        for name, child in module.named_children()
        for found in _candidates(child, f"{path}.{name}".lstrip("."))
    ]
    yield from inner or [(path, module)]


def _some(names: list[str]) -> str:
    return ", ".join([*names[:NAMED], *["…"] * (len(names) > NAMED)])
