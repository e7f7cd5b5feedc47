"""Kernels of a GPU: flash, memory-efficient, cuDNN and plain, in each dtype that they take."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from torch.nn import attention as kernels

import dinov2_attn
from dinov2_attn import artifact_tokens, attention_maps, record, rollout, statistics
from dinov2_attn.errors import NotEditedError
from tests.support import upstreams
from tests.support.strategies import noise, randomise
from tests.support.tolerances import assert_close, assert_same_bits

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA device: the same properties are tested on the CPU in tests/kernels",
)

HALF = (torch.float16, torch.bfloat16)
# Flash and cuDNN take half precision only.
KERNELS = [
    ("FLASH_ATTENTION", HALF),
    ("CUDNN_ATTENTION", HALF),
    ("EFFICIENT_ATTENTION", (*HALF, torch.float32)),
    ("MATH", (*HALF, torch.float32, torch.float64)),
]
CASES = [(name, dtype) for name, dtypes in KERNELS for dtype in dtypes]


@pytest.fixture(scope="module")
def grafted():
    upstreams.FIRST.load()
    with dinov2_attn.install(upstreams.FIRST.package):
        yield upstreams.FIRST


def model_of(width=192, heads=3, depth=2):
    timm = pytest.importorskip("timm", reason="timm is not installed: transformers' model runs")
    model = timm.create_model(
        "vit_small_patch14_reg4_dinov2",
        img_size=98,
        embed_dim=width,
        num_heads=heads,
        depth=depth,
    )
    return randomise(model, 3).eval().cuda()


@contextmanager
def observed(model):
    """Yield for each attention the projection, and what its kernel returned (before ``proj``)."""
    seen = []
    with ExitStack() as hooks:
        for block in model.blocks:
            found = {}
            seen.append(found)
            for layer, keep in (
                (block.attn.qkv, lambda m, args, out, found=found: found.update(qkv=out)),
                (block.attn.proj, lambda m, args, out, found=found: found.update(out=args[0])),
            ):
                hooks.callback(layer.register_forward_hook(keep).remove)
        yield seen


def truth(found, heads):
    """Return softmax(q kᵀ · scale) in float64, and the values."""
    qkv = found["qkv"].double()
    batch, length, _ = qkv.shape
    query, key, value = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / query.shape[-1] ** 0.5
    return scores.softmax(-1), value


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_weights_are_those_of_the_kernel(name, dtype):
    model, images = model_of().to(dtype), noise(2, 3, 98, 98, seed=1, dtype=dtype).cuda()
    backend = getattr(kernels.SDPBackend, name)
    with torch.no_grad(), kernels.sdpa_kernel(backend):
        plain = model(images)
        with observed(model) as seen, record(model, check="every") as maps:
            output = model(images)
        with record(model, queries="cls", heads="mean") as some:
            model(images)
    assert_same_bits(output, plain, "features")
    for found, weights, mean in zip(seen, maps.weights, some.weights, strict=True):
        expected, value = truth(found, 3)
        assert weights.dtype == dtype
        assert_close(weights, expected, "weights", dtype=dtype)
        assert_close(mean, expected[:, :, :1].mean(1), "head mean of CLS", dtype=dtype)
        mixed = torch.einsum("bhqk,bhkd->bqhd", weights.double(), value).flatten(2)
        assert_close(mixed, found["out"], "weights @ v", dtype=dtype)
    assert maps.grid == (7, 7)
    assert maps.prefix == 5


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_is_followed(dtype):
    model, images = model_of(), noise(2, 3, 98, 98, seed=1, dtype=torch.float32).cuda()
    with torch.no_grad(), torch.autocast("cuda", dtype):
        plain = model(images)
        with observed(model) as seen, record(model, check="every") as maps:
            output = model(images)
    assert_same_bits(output, plain, "features")
    for found, weights in zip(seen, maps.weights, strict=True):
        assert weights.dtype == dtype
        assert_close(weights, truth(found, 3)[0], "weights", dtype=dtype)


def test_gradients_and_random_numbers_are_untouched():
    model, images = model_of(), noise(2, 3, 98, 98, seed=1, dtype=torch.float32).cuda()
    for block in model.blocks:
        block.attn.proj_drop.p = 0.2
    model.train()
    gradients = []
    for context in (nullcontext(), record(model)):
        torch.manual_seed(5)
        model.zero_grad()
        with kernels.sdpa_kernel(kernels.SDPBackend.MATH), context:
            model(images).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert_same_bits(gradients[1], gradients[0], "gradients")


def test_results_are_those_of_the_cpu():
    model, images = model_of().double(), noise(2, 3, 98, 98, seed=1, dtype=torch.float64).cuda()
    there = results(model, images)
    here = results(model.cpu(), images.cpu())
    for name, tensor in there.items():
        assert tensor.device.type == "cuda", name
        assert_close(tensor.cpu(), here[name], name)


def results(model, images):
    found = artifact_tokens(model, images)
    return {
        "weights": attention_maps(model, images).weights[0],
        "rollout": rollout(model, images).weights,
        "norms": found.norms,
        "received by artifacts": found.from_all,
    } | {
        name: torch.cat(own).nan_to_num(nan=-1)  # of tokens that are no patches
        for name, own in statistics(model, images).values.items()
    }


def test_asking_is_recording(grafted):
    cls = grafted.cls("DinoVisionTransformer")
    model = cls(
        img_size=56, patch_size=14, embed_dim=128, depth=2, num_heads=2, mlp_ratio=2, block_chunks=0
    )
    model = randomise(model, 3).eval().cuda()
    images = noise(2, 3, 56, 70, seed=1, dtype=torch.float32).cuda()
    with torch.no_grad():
        with record(model) as maps:
            model.forward_features(images)
        asked = model.get_self_attention(images)
        last = model.get_last_self_attention(images, queries="cls")
    assert_close(list(asked), list(maps.weights))
    assert_close(last, maps.weights[-1][:, :, :1])


def flipped(layer, weights):
    return weights.flip(-1)


EDITS = {
    "heads": {"heads": {0: [1], 1: [0, 2]}},
    "keys": {"keys": "registers"},
    "keys of some queries": {"keys": [7, 9], "queries": "cls"},
    "weights": {"weights": flipped, "queries": [0, 3]},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits_are_those_of_the_cpu(edit):
    model, images = model_of().double(), noise(2, 3, 98, 98, seed=1, dtype=torch.float64).cuda()
    found = []
    for device in ("cuda", "cpu"):
        model, images = model.to(device), images.to(device)
        with torch.no_grad(), dinov2_attn.edit(model, **edit), record(model) as maps:
            found.append((model(images).cpu(), [w.cpu() for w in maps.weights]))
    assert_close(found[0], found[1])


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_edits_keep_what_they_do_not_change(name, dtype):
    model, images = model_of().to(dtype), noise(2, 3, 98, 98, seed=1, dtype=dtype).cuda()
    with torch.no_grad(), kernels.sdpa_kernel(getattr(kernels.SDPBackend, name)):
        with observed(model) as plain:
            model(images)
        with dinov2_attn.edit(model, heads={0: [1]}), observed(model) as seen:
            model(images)
        if name == "FLASH_ATTENTION":
            with (
                pytest.raises(NotEditedError, match="none"),
                dinov2_attn.edit(model, keys=[7], queries=[0]),
            ):
                model(images)
            hidden = None
        else:
            with dinov2_attn.edit(model, keys=[7], queries=[0]), observed(model) as hidden:
                model(images)
    before, after = (x[0]["out"].unflatten(-1, (3, -1)) for x in (plain, seen))
    assert_same_bits(after[:, :, 1], torch.zeros_like(after[:, :, 1]))
    assert_same_bits(after[:, :, [0, 2]], before[:, :, [0, 2]])
    if hidden is None:  # flash takes no mask
        return
    assert_same_bits(hidden[0]["out"][:, 1:], plain[0]["out"][:, 1:])
    weights, value = truth(plain[0], 3)
    row = weights[:, :, :1].clone()
    row[..., 7] = 0
    mixed = (row / row.sum(-1, keepdim=True) @ value).transpose(1, 2).flatten(2)
    assert_close(hidden[0]["out"][:, :1], mixed, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_pass_from_its_weights_and_statistics_are_those_of_the_matrices(dtype):
    model, images = model_of().to(dtype), noise(2, 3, 98, 98, seed=1, dtype=dtype).cuda()
    with torch.no_grad():
        with record(model, features="from_weights"):  # both, for the proof of its first pass
            model(images)
        with observed(model) as seen, record(model, features="from_weights") as maps:
            model(images)
        with observed(model) as plain, record(model, queries=[], statistics="entropy") as some:
            model(images)
    for found, weights in zip(seen, maps.weights, strict=True):
        expected, value = truth(found, 3)
        assert_close(weights, expected, "weights", dtype=dtype)
        mixed = torch.einsum("bhqk,bhkd->bqhd", weights.double(), value).flatten(2)
        assert_close(found["out"], mixed, "weights @ v", dtype=dtype)
    for found, entropy in zip(plain, some.statistics["entropy"], strict=True):
        expected, _ = truth(found, 3)
        assert entropy.dtype == torch.float32
        assert_close(entropy, torch.special.entr(expected).sum(-1), within=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_weights_are_kept_in_half_precision(dtype):
    model, images = model_of().to(dtype), noise(2, 3, 98, 98, seed=1, dtype=dtype).cuda()
    with torch.no_grad(), observed(model) as seen, record(model, dtype=torch.float16) as maps:
        model(images)
    for found, weights in zip(seen, maps.weights, strict=True):
        assert weights.dtype == torch.float16
        coarse = torch.float16 if dtype == torch.float32 else dtype
        assert_close(weights, truth(found, 3)[0], "weights", dtype=coarse)


EVERYTHING = {"facets": "key", "statistics": "entropy"}


def tensors_of(maps):
    return [*maps.weights, *maps.facets["key"], *maps.statistics["entropy"]]


@pytest.mark.parametrize("batches", [1, 3])
@torch.no_grad()
def test_results_are_copied_to_pinned_memory(batches):
    model, images = model_of(), noise(2, 3, 98, 98, seed=1, dtype=torch.float32).cuda()
    for _ in range(batches):
        with record(model, **EVERYTHING) as expected, record(model, queries="cls") as rows:
            plain = model(images)
        with record(model, device="cpu", **EVERYTHING) as maps:
            with record(model, device="cpu", queries="cls") as inner:
                output = model(images)
            found = [one.clone() for one in tensors_of(maps)]  # before anything waits for the GPU
        assert_same_bits(output, plain, "features")
        assert all(one.is_pinned() for one in tensors_of(maps))
        assert_same_bits(found, [one.cpu() for one in tensors_of(expected)])
        assert_same_bits(list(inner.weights), [one.cpu() for one in rows.weights])
        images = images.flip(-1)


@torch.no_grad()
def test_a_result_that_reduce_changes_later_is_copied_as_it_was():
    model, images = model_of(depth=8), noise(2, 3, 98, 98, seed=1, dtype=torch.float32).cuda()
    count = torch.zeros(2**26, device="cuda")  # its copy takes longer than a layer
    with record(model, device="cpu", reduce=lambda *_: count.add_(1)) as maps:
        model(images)
    for number, kept in enumerate(maps.weights, 1):
        assert_same_bits(kept, torch.full_like(kept, number))


def test_gradients_are_copied_and_go_through_copies():
    model, images = model_of(), noise(2, 3, 98, 98, seed=1, dtype=torch.float32).cuda()
    images.requires_grad_()
    found = []
    for device in (None, "cpu"):
        with record(model, gradients=True, device=device) as maps:
            model(images).square().mean().backward()
        with record(model, device=device) as part_of_graph:
            model(images)
        (through,) = torch.autograd.grad(part_of_graph.weights[1].square().sum(), images)
        found.append([*(one.cpu() for one in maps.gradients), through])
        assert {one.device.type for one in maps.gradients} == {device or "cuda"}
    assert_close(found[1], found[0])


@torch.no_grad()
def test_the_gpu_holds_the_results_of_a_few_layers():
    model, images = model_of(depth=12), noise(8, 3, 98, 98, seed=1, dtype=torch.float32).cuda()
    peaks = []
    for options in ({}, {"device": "cpu"}):
        model(images)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with record(model, **options) as maps:
            model(images)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        matrix = maps.weights[0].nbytes
        del maps
    assert peaks[1] < peaks[0] - 6 * matrix
