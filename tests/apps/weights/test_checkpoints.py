"""Weights of real models, saved in every way, in models of every shape: the same, or an error."""

from __future__ import annotations

import fractions
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dinov2_attn import load_checkpoint
from dinov2_attn.apps.weights.checkpoints import fill
from dinov2_attn.apps.weights.layouts import WRAPPERS, plain
from dinov2_attn.apps.weights.reading import read
from dinov2_attn.errors import InvalidInputError, UnreadableFileError
from tests.support import checkpoint_files, upstreams
from tests.support.checkpoint_files import OPTIMIZER
from tests.support.strategies import ModelCase, model_cases, noise, randomise
from tests.support.subprocesses import python
from tests.support.tolerances import assert_close, assert_same_bits, same_bits

CASE = ModelCase(
    depth=4, chunks=0, registers=0, heads=1, grid=(3, 2), batch=1, dtype=torch.float32, seed=0
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints") / "weights.pth"


@pytest.fixture
def model():
    return CASE.build(upstreams.FIRST)


def chunked(case):
    """Draw the case's model in another number of chunks: 0 is flat."""
    return st.integers(0, case.depth).map(lambda chunks: (case, chunks))


def other(case):
    return replace(case, seed=case.seed + 1)


def assert_same(loaded, model, case):
    ours, theirs = (dict(m.named_parameters()) for m in (loaded, model))
    renamed = {plain(name): parameter for name, parameter in theirs.items()}
    assert ours.keys()
    assert_same_bits(ours, {name: renamed[plain(name)] for name in ours})
    with torch.no_grad():
        assert_close(loaded(case.images), model(case.images))


def untouched(model):
    """Return a check that the weights of ``model`` are still what they are now."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return lambda: same_bits(dict(model.state_dict()), before)


def assert_refused(model, file, message, error=UnreadableFileError, **options):
    intact = untouched(model)
    with pytest.raises(error, match=message):
        load_checkpoint(model, file, **options)
    assert intact()


@given(form=st.sampled_from(sorted(checkpoint_files.FORMATS)), pair=model_cases().flatmap(chunked))
def test_any_format_fills_flat_and_chunked_models(models, file, form, pair):
    case, chunks = pair
    assert_taken(models, file, form, case, chunks)


@pytest.mark.parametrize("chunks", [0, 2])
@pytest.mark.parametrize("form", checkpoint_files.FORMATS)
def test_every_format_fills_a_model(file, form, chunks):
    assert_taken(upstreams.FIRST, file, form, replace(CASE, chunks=2 - chunks), chunks)


def assert_taken(upstream, file, form, case, chunks):
    """The teacher's weights where there are several, and what is left out is named."""
    make, left_out = checkpoint_files.FORMATS[form]
    model = case.build(upstream)
    torch.save(make(model, other(case).build(upstream)), file)
    loaded = other(case).build(upstream, chunks=chunks)
    assert set(load_checkpoint(loaded, file)) == left_out
    assert_same(loaded, model, case)


@given(pair=model_cases().flatmap(chunked))
def test_safetensors_are_read_too(models, file, pair):
    save_file = pytest.importorskip(
        "safetensors.torch", reason="without it: test_safetensors_without_their_library"
    ).save_file
    case, chunks = pair
    model = case.build(models)
    path = file.with_suffix(".safetensors")
    for name in (path, file):  # known by their content under any name
        save_file(checkpoint_files.training(model).state_dict(), name)
        loaded = other(case).build(models, chunks=chunks)
        assert set(load_checkpoint(loaded, name)) == {"dino_head", "ibot_head"}
        assert_same(loaded, model, case)


def test_wrapped_models_are_filled(model, file):
    around = nn.ModuleDict({"backbone": model})
    for wrap in (
        nn.DataParallel,
        checkpoint_files.compiled,
        lambda m: nn.ModuleDict({"backbone": m}),
    ):
        part = "backbone" in dict(wrap(nn.Identity()).named_children())
        torch.save((around if part else model).state_dict(), file)
        loaded = other(CASE).build(upstreams.FIRST, chunks=2)
        load_checkpoint(wrap(loaded), file)
        assert_same(loaded, model, CASE)


@pytest.mark.skipif(
    sys.version_info >= (3, 11) and torch.__version__ < "2.1",
    reason="this torch compiles on no such Python: test_models_that_are_wrapped_... runs",
)
def test_a_compiled_model_is_saved_and_filled(model, file):
    torch.save(torch.compile(model).state_dict(), file)
    loaded = other(CASE).build(upstreams.FIRST)
    load_checkpoint(torch.compile(loaded), file)
    assert_same(loaded, model, CASE)


def test_loaded_weights_are_logged(model, file, caplog):
    make, _ = checkpoint_files.FORMATS["model_final.pth"]
    torch.save(make(model, other(CASE).build(upstreams.FIRST)), file)
    caplog.set_level("INFO", "dinov2_attn")
    load_checkpoint(model, str(file))
    assert f"{file}: loaded model.teacher.backbone, left out " in caplog.text
    assert "model.teacher.dino_head" in caplog.text


def test_all_weights_of_a_bare_backbone_are_loaded(model, file, caplog):
    torch.save(model.state_dict(), file)
    caplog.set_level("DEBUG", "dinov2_attn")
    assert load_checkpoint(model, file) == ()
    assert caplog.messages == [f"{file}: loaded all"]
    torch.save({"teacher": model.state_dict(), "epoch": 1, "optimizer": OPTIMIZER}, file)
    assert load_checkpoint(model, file) == ("epoch", "optimizer")
    assert caplog.messages[1:] == [f"{file}: loaded teacher, left out epoch, optimizer"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_floats_are_converted_to_the_dtype_of_the_model(model, file, dtype):
    torch.save({k: tensor.to(dtype) for k, tensor in model.state_dict().items()}, file)
    loaded = other(CASE).build(upstreams.FIRST)
    load_checkpoint(loaded, file)
    for name, tensor in loaded.state_dict().items():
        assert_same_bits(tensor, model.state_dict()[name].to(dtype).float())


def test_integers_stay_integers(file):
    layer, filled = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    layer.num_batches_tracked += 7
    torch.save(layer.state_dict(), file)
    load_checkpoint(filled, file)
    assert filled.num_batches_tracked == 7


def test_heads_are_loaded_if_the_model_has_them(model, file):
    modules = checkpoint_files.training(model)
    torch.save({"teacher": modules.state_dict()}, file)
    loaded = checkpoint_files.training(other(CASE).build(upstreams.FIRST), seed=1)
    assert load_checkpoint(loaded, file) == ()
    assert_same_bits(list(loaded.parameters()), list(modules.parameters()))


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
def test_wrappers_are_removed_anywhere_in_a_name(wrapper):
    """A part of a longer word is none of them."""
    assert (
        plain(f"{wrapper}.blocks.1.7.{wrapper}.norm1.{wrapper}.weight") == "blocks.7.norm1.weight"
    )
    assert plain(f"my{wrapper}.blocks.7.weight") == f"my{wrapper}.blocks.7.weight"


# What does not fit


@given(case=model_cases(), data=st.data())
def test_missing_unexpected_and_misshapen_parameters_are_named(models, file, case, data):
    model = case.build(models)
    state = dict(model.state_dict())
    # A mask token may be missing, see test_other_checkpoints.
    name = data.draw(st.sampled_from(sorted(set(state) - {"mask_token"})))
    change = data.draw(st.sampled_from(["missing", "left over", "of another shape"]))
    tensor = state.pop(name)
    if change == "left over":
        state[name], name = tensor, f"blocks.0.{name}"
        state[name] = tensor
    elif change == "of another shape":
        state[name] = torch.zeros(9, *tensor.shape)
    before = data.draw(st.sampled_from(["", "teacher.backbone.", "module."]))
    torch.save({f"{before}{key}": tensor for key, tensor in state.items()}, file)
    where = r", below teacher\.backbone," if "teacher" in before else ""
    shapes = rf" \(9, .*\) for \({tensor.shape[0]}," if change == "of another shape" else ""
    message = rf"Found {file}{where} with 1 {change}: {plain(name)}{shapes}"
    assert_refused(other(case).build(models), file, message)


def test_many_differences_are_counted(model, file):
    deeper = replace(CASE, depth=9, heads=2).build(upstreams.FIRST)
    torch.save(deeper.state_dict(), file)
    message = (
        r"(?s)with \d+ left over: blocks\.4\..*, …; \d+ of another shape: cls_token \(1, 1, 8\) "
        r"for \(1, 1, 4\), .*…\.\nIt holds ViT-8x9/2: build that in place of ViT-4x4/2\."
    )
    assert_refused(model, file, message)


def test_the_error_names_the_architecture_of_the_file(model, file):
    larger = replace(CASE, heads=3).build(upstreams.FIRST)
    torch.save({"teacher": checkpoint_files.training(larger).state_dict()}, file)
    assert_refused(model, file, r"It holds ViT-12x4/2: build that in place of ViT-4x4")
    torch.save({"weight": torch.ones(3)}, file)
    assert_refused(
        model, file, r"(?s)missing: cls_token.*1 left over: weight\.\nBuild the model as it"
    )


ONES = torch.ones(1, 1, 4)
KINDS = {
    "whole": (ONES.long(), "torch.int64, torch.strided, cpu"),
    "truth": (ONES.bool(), "torch.bool, torch.strided, cpu"),
    "complex": (ONES.to(torch.complex64), "torch.complex64, torch.strided, cpu"),
    "sparse": (ONES.to_sparse(), "torch.float32, torch.sparse_coo, cpu"),
    "none": (ONES.to("meta"), "torch.float32, torch.strided, meta"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(("tensor", "found"), KINDS.values(), ids=KINDS)
def test_tensors_without_floats_are_of_another_kind(model, file, tensor, found):
    torch.save({**model.state_dict(), "cls_token": tensor}, file)
    message = rf"{file} with 1 of another kind: cls_token \({found}\)\.\nBuild the model as it was"
    assert_refused(model, file, message)


def test_a_model_of_the_same_architecture_is_not_proposed(model, file):
    """Where both are described alike, the difference is one that no name tells."""
    state = dict(model.state_dict())
    del state["norm.bias"]
    torch.save(state, file)
    assert_refused(
        model, file, r"1 missing: norm\.bias\.\nBuild the model as it was when it was saved"
    )


def test_the_model_of_the_file_is_proposed_for_another_kind_of_layer(model, file):
    torch.save(model.state_dict(), file)
    message = r"(?s)\d+ left over: .*\.\nIt holds ViT-4x4/2: build that in place of this model\."
    assert_refused(nn.ModuleDict({"norm": nn.Linear(3, 2)}), file, message)


def test_several_equal_models_are_an_error(model, file):
    state = model.state_dict()
    torch.save({"model": state, "other": dict(state)}, file)
    message = (
        r"(?s)one model, or of a teacher.*one in each of model, other\.\nChoose one: --key other"
    )
    assert_refused(model, file, message)
    torch.save({"a": {"teacher": state}, "b": {"teacher": dict(state)}}, file)
    assert_refused(model, file, r"one in each of a\.teacher, b\.teacher\.")


def test_a_token_elsewhere_is_no_second_model(model, file):
    lone = {"cls_token": torch.zeros(1, 1, 4)}
    for content in ({"a": lone, "b": model.state_dict()}, {"b": model.state_dict(), "c": lone}):
        torch.save(content, file)
        loaded = other(CASE).build(upstreams.FIRST)
        load_checkpoint(loaded, file)
        assert_same(loaded, model, CASE)


def test_a_word_where_the_model_is_named_is_left_out(model, file):
    state = {f"teacher.backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({**state, "teacher": "ViT-S"}, file)
    loaded = other(CASE).build(upstreams.FIRST)
    assert load_checkpoint(loaded, file) == ("teacher",)
    assert_same(loaded, model, CASE)


def test_an_incomplete_teacher_is_not_replaced_by_the_student(model, file):
    state, teacher = model.state_dict(), dict(model.state_dict())
    for name in ("cls_token", "blocks.3.norm1.weight"):
        del teacher[name]
    torch.save({"student": state, "teacher": teacher}, file)
    assert_refused(model, file, r"below teacher, with 2 missing: cls_token, blocks\.3\.norm1\.w")


def test_chunks_that_count_from_zero_are_an_error(model, file):
    state = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            number = int(parts[1])
            parts[1:2] = str(number // 2), str(number % 2)
        state[".".join(parts)] = tensor
    torch.save(state, file)
    message = (
        r"(?s)parameter once\.\nFound .*blocks\.0\.0\.\S+ and blocks\.1\.0\.\S+, which are the s"
    )
    assert_refused(model, file, message)


def test_a_repeated_name_is_an_error(model, file):
    state = model.state_dict()
    torch.save(
        {**{f"module.{k}": v for k, v in state.items()}, "norm.bias": state["norm.bias"]}, file
    )
    assert_refused(model, file, r"with module\.norm\.bias and norm\.bias, which are the same")


@pytest.mark.parametrize("key", ["_flat_param", "blocks.0._fsdp_wrapped_module._flat_param"])
def test_a_shard_is_recognised_by_its_name(model, file, key):
    torch.save({"model": {f"teacher.backbone._fsdp_wrapped_module.{key}": torch.ones(9)}}, file)
    assert_refused(
        model, file, r"(?s)one process's shard.*FSDP.*teacher_checkpoint\.pth.*FULL_STATE"
    )


def test_a_shard_is_recognised_by_its_class(model, file, tmp_path):
    """As FSDP saves it, from a process with a group of one; torch loads none with care."""
    code = f"""
import torch, torch.distributed as dist
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
shard = init_from_local_shards([Shard.from_tensor_and_offsets(torch.zeros(8), [0], 0)], 8)
torch.save({{"model": {{"teacher.backbone._flat_param": shard}}}}, r"{file}")
"""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo: test_a_shard_is_recognised_by_its_name")
    result = python("-c", code, cwd=tmp_path, GLOO_SOCKET_IFNAME="lo")
    assert result.returncode == 0, result.stderr
    assert_refused(
        model, file, r"(?s)one process's shard.*FSDP.*teacher_checkpoint\.pth.*FULL_STATE"
    )


def test_code_next_to_tensors_is_named(model, file):
    """Training scripts save their arguments along; which class it is says what to leave out."""
    torch.save({"teacher": model.state_dict(), "args": fractions.Fraction(1, 2)}, file)
    assert_refused(model, file, r"holds an object of fractions\.Fraction, and reading it would run")


def test_a_dict_that_contains_itself_is_read_once(model, file):
    content = {"teacher": dict(model.state_dict()), "epoch": 3}
    content["again"] = content["teacher"]["again"] = content
    torch.save(content, file)
    loaded = other(CASE).build(upstreams.FIRST)
    left_out = load_checkpoint(loaded, file)
    assert_same(loaded, model, CASE)
    assert set(left_out) == {"again", "teacher.again", "epoch"}


def test_a_model_without_memory_is_refused(file):
    layer = nn.Linear(3, 2)
    torch.save(layer.state_dict(), file)
    with pytest.raises(InvalidInputError, match=r"one on the meta device\.\nCall model\.to_empty"):
        load_checkpoint(layer.to("meta"), file)


# Positional embeddings of another size


@given(case=model_cases(), side=st.integers(1, 9), chunks=st.integers(0, 1))
def test_positions_are_resized_on_request_as_upstream_does(models, file, case, side, chunks):
    """A model for images of this size answers as the one that was saved does for them."""
    model = case.build(models)
    torch.save({"teacher": checkpoint_files.training(model).state_dict()}, file)
    options = {"num_register_tokens": case.registers} if models.has_registers else {}
    loaded = randomise(
        models.cls("DinoVisionTransformer")(
            img_size=side * case.patch,
            patch_size=case.patch,
            embed_dim=4 * case.heads,
            depth=case.depth,
            num_heads=case.heads,
            mlp_ratio=2,
            init_values=1.0,
            block_chunks=chunks,
            **options,
        ).to(case.dtype),
        1,
    )
    images = noise(2, 3, side * case.patch, side * case.patch, seed=case.seed, dtype=case.dtype)
    if side != 4:
        sizes = rf"pos_embed \(1, 17, {4 * case.heads}\) for \(1, {side**2 + 1}, "
        asks = r"\.\nResize it with load_checkpoint\(…, interpolate_pos_embed=True\)\.$"
        message = rf"(?s)1 of another square of patches: {sizes}.*{asks}"
        assert_refused(loaded, file, message)
    load_checkpoint(loaded, file, interpolate_pos_embed=True)
    with torch.no_grad():
        assert_close(loaded(images), model(images))


def test_positions_of_a_part_are_resized_too(model, file, caplog):
    larger = checkpoint_files.training(model)
    state = larger.state_dict()
    torch.save({**state, "backbone.pos_embed": noise(1, 10, 4, seed=1)}, file)
    assert_refused(
        larger, file, r"1 of another square of patches: backbone\.pos_embed \(1, 10, 4\)"
    )
    caplog.set_level("INFO", "dinov2_attn")
    load_checkpoint(larger, file, interpolate_pos_embed=True)
    assert caplog.messages[0] == "pos_embed: 10 tokens resized to 17"
    alone = other(CASE).build(upstreams.FIRST)
    torch.save({**model.state_dict(), "pos_embed": noise(1, 10, 4, seed=1)}, file)
    load_checkpoint(alone, file, interpolate_pos_embed=True)
    assert_same_bits(alone.pos_embed, model.pos_embed)


def test_positions_that_fit_are_loaded_unchanged(model, file, caplog):
    torch.save(model.state_dict(), file)
    caplog.set_level("DEBUG", "dinov2_attn")
    load_checkpoint(model, file, interpolate_pos_embed=True)
    assert caplog.messages == [f"{file}: loaded all"]


@pytest.mark.parametrize("shape", [(1, 10, 5), (2, 10, 4), (10, 4), (1, 1, 10, 4)], ids=str)
def test_positions_of_other_features_are_of_another_shape(model, file, shape):
    torch.save({**model.state_dict(), "pos_embed": torch.zeros(shape)}, file)
    for asked in (False, True):
        assert_refused(model, file, r"with 1 of another shape: pos_", interpolate_pos_embed=asked)


def test_positions_of_another_square_that_are_no_numbers(model, file):
    """To be resized they would have to be: what is the matter first is their kind."""
    torch.save({**model.state_dict(), "pos_embed": torch.zeros(1, 10, 4).long()}, file)
    for asked in (False, True):
        message = (
            r"(?s)1 of another shape: pos_\S+ .*; 1 of another kind: pos_embed \(torch\.int64,"
        )
        assert_refused(model, file, message, interpolate_pos_embed=asked)


def test_another_tensor_of_the_shape_of_positions_is_not_resized(file):
    layer = nn.ParameterDict({"pos": nn.Parameter(torch.ones(1, 17, 4))})
    torch.save({"pos": torch.ones(1, 10, 4)}, file)
    assert_refused(layer, file, "1 of another shape: pos", interpolate_pos_embed=True)


@pytest.mark.parametrize("positions", [1, 2, 18, 0])
def test_positions_that_are_no_square_are_of_another_shape(model, file, positions):
    torch.save({**model.state_dict(), "pos_embed": torch.zeros(1, positions, 4)}, file)
    for asked in (False, True):
        message = r"1 of another shape: pos_embed \(1, \d+, 4\) for \(1, 17, 4\)"
        if positions == 2:
            continue  # a square of one patch
        assert_refused(model, file, message, interpolate_pos_embed=asked)


def test_a_checkpoint_that_was_read_is_not_resized_without_request(model, file):
    torch.save({**model.state_dict(), "pos_embed": torch.zeros(1, 10, 4)}, file)
    with pytest.raises(UnreadableFileError, match="1 of another square of patches"):
        fill(model, read(file))


def test_resizing_changes_no_other_check(model, file):
    state = {**model.state_dict(), "pos_embed": torch.zeros(1, 10, 4)}
    del state["norm.bias"]
    torch.save(state, file)
    assert_refused(model, file, "1 missing: norm.bias", interpolate_pos_embed=True)


# Without the library


def test_safetensors_without_their_library(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    code = """
import sys
sys.modules["safetensors"] = sys.modules["safetensors.torch"] = None
import dinov2_attn, torch
try:
    dinov2_attn.load_checkpoint(torch.nn.Linear(3, 2), "w.safetensors")
except dinov2_attn.errors.UnavailableError as error:
    print(error)
"""
    printed = python("-c", code, cwd=tmp_path).stdout
    assert "pip install 'dinov2-attn[viz]'" in printed
