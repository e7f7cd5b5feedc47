"""Advice that no case follows: by the reason and the area, a few words of each."""

from __future__ import annotations

TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "of a run that was killed, which test_extract_killed kills and test_extract_ranks continues": {
        "apps/extraction": ("Start torchrun again. The run continues where it stopped",),
    },
    "of models of another layout, which test_any_model and test_other_libraries build": {
        "maps": (
            "Take the matrices of a pass: with record(model, grid=",
            "Take norms and maps of such a model one by one",
            "Record its passes: with record(model) as maps: model(images)",
        ),
        "grafting": ("Pass the position of the token that you mean, or slice(None) for all",),
    },
    "of facets of several kinds of attention, which attention_maps refuses in the same way": {
        "apps/extraction": ("or leave facets and statistics out",),
    },
    "of biases and lists of tensors, which test_bias, test_call and test_nested follow": {
        "math": (
            "Pass the dense tensor of what is added to the scores",
            "Check heads and tokens",
            "Leave _batch_sizes at None",
            "Leave _batch_sizes at None",
            "Name the keys that each block of queries sees",
            "Concatenate the sequences along dimension 1",
        ),
        "kernels": (
            "import upstream without XFORMERS_DISABLED",
            "or pass attn_bias.materialize(",
            "build with drop_path_rate=0",
        ),
    },
    "of DINOv3, whose own tests follow it (each test_dinov3, test_own_pass)": {
        "kernels": ("Load a checkpoint or initialise the model, and look for NaN",),
        "apps/weights": (
            "Name the folder that `git clone` made",
            "and name the folder: --repo PATH.",
            "Choose the source before dinov3 is imported, in a new process",
        ),
        "apps/cli": (
            "Leave them out: the name tells",
            "Get them from Meta, then name the file: --weights PATH",
        ),
    },
    "needs a network or a package index": {
        "apps/weights": (
            "hf download",
            "The download may be incomplete. Remove the file and run again",
            "The partial download was deleted. Check your connection and run again",
            "It is the file of another classifier. Remove it and run again",
            "Give your own weights with --weights PATH. --random-weights runs without",
            "Connect to GitHub or PyPI once",
            "Connect to GitHub.",
            "Connect to the network, or give a file by --weights PATH",
        ),
        "_download": (
            "Check that `python -m pip download` works here",
            "Check which package index pip uses",
        ),
        "proof/verify": ("Name the version to verify",),
    },
    "needs a process without the library, or a program that is not installed": {
        "_imports": (
            "Install it with `pip install",
            "Install them with `pip install",
        ),
        "apps/extraction": ("Install it with `pip install 'dinov2-attn[pandas]'`",),
        "proof/verify": ("pip install 'dinov2-attn[test]'",),
        "apps/viz": (
            "Install it with `pip install",
            "Install it with `pip install 'dinov2-attn[video]'`",
            "Install the one of PyPI: `pip install --force-reinstall av`",
            "pip install tifffile",
            "Install it (apt install ffmpeg",
            "Run `pip install --upgrade pillow`, or write a GIF",
            "or install an ffmpeg with H.264",
        ),
    },
    "needs a disk that cannot be written, and a package index: test_source follows it": {
        "_download": ("Set TORCH_HOME to a folder",),
    },
    "of a model with images of one size, for which test_attention_logger follows it": {
        "apps/training": ("Pass inputs (C, H, W) of the size that the model takes",),
    },
    "of exports, which test_onnx follows where onnxruntime is installed": {
        "apps/export": (
            "No file was written. Try another --opset",
            "Leave it out, or give",
            "Install a newer onnxruntime, or write a file that it cannot check",
            "Wrap the model in a module whose forward returns the tensors",
            "Try model.onnx.",
            "Name another file.",
            "Convert it: model.float().",
            "Try ",
            "Run `pip install --upgrade torch`.",
            "Export a model on the CPU without xFormers",
            "Install them with `pip install 'dinov2-attn[onnx]'`.",
        ),
        "apps/cli": ("Name it: model.onnx.",),
    },
    "of trainings, which apps/training follows with the libraries of loggers": {
        "apps/training": (
            "Draw from a checkpoint: dinov2-attn heatmap",
            "Pass the module that torch.compile was given",
            "Install it with `pip install 'dinov2-attn[training]'`",
            "Pass Trainer(logger=TensorBoardLogger(folder))",
        ),
    },
    "of DICOM, which test_dicom follows where pydicom is installed": {
        "apps/viz": (
            "Leave it out: reports, structures and indexes have no pixels",
            "Install it with `pip install 'dinov2-attn[dicom]'`",
            "Check that a viewer opens it. Compressed files may need",
        ),
    },
    "of Parquet, zarr and FiftyOne: test_extract_parquet, …_zarr and test_heatmaps follow it": {
        "apps/extraction": (
            "Install it with `pip install 'dinov2-attn[parquet]'`",
            "Install it with `pip install 'dinov2-attn[zarr]'`",
            "Store float16, or safetensors",
            "Install it with `pip install 'dinov2-attn[fiftyone]'`",
            'Say which: query="cls" or query=(3, 17)',
            "Name the folder that the paths of the index are below",
        ),
    },
    "runs a command that test_not_a_checkpoint runs": {
        "apps/weights": ("python -m torch.distributed.checkpoint.format_utils dcp_to_torch",),
    },
    "the remedy is the program of another project": {
        "apps/weights": (
            "Load it with the library that made it",
            "Load it with DINOv3's code: --arch dinov3_vits16 or its like",
        ),
    },
    "needs a revision of upstream that rounds otherwise than those on PyPI": {
        "apps/weights": ("Build the model with another img_size",),
    },
    "of odd attention, which test_layouts_of_heads builds": {
        "kernels": (
            "Leave this layer out with layers=[...]. record(model) gives",
            "Leave this module out with layers=[...], or let its code write into a copy",
        ),
    },
    "of videos, which need PyAV: test_videos makes broken ones": {
        "apps/viz": (
            "Copy it again, or repair it: ffmpeg",
            "Leave it out: the first frames of a recording",
            "Write it into a file first: it is read several times",
            "Check that a video player plays it to its last frame",
            "Check that a video player plays it",
            "Check that a video player plays it",
        ),
        "apps/cli": (
            "Choose one of these, or mean",
            "Enlarge them, or draw a frame as an image",
            "Save a frame of it as an image",
        ),
    },
    "needs a GPU, whose flash kernel takes no mask: test_cuda follows it there": {
        "kernels": ("Allow one more: sdpa_kernel([SDPBackend.FLASH_ATTENTION",),
    },
    "needs a GPU that fails: test_extract_failing puts one in its place": {
        "apps/viz": ("Start the program again",),
    },
    "of a library that is not installed, or a file that may not be read (not by root)": {
        "apps/cli": (
            "Install it with `pip install 'dinov2-attn[completion]'`",
            "Change its permissions",
        ),
        "apps/weights": ("Install it with `pip install timm`",),
    },
    "needs gigabytes: test_hostile_images lowers the bound": {
        "apps/viz": ("or allow more with --max-pixels N",),
    },
    "of a file that is removed while it is read": {
        "apps/viz": ("Check the path and that an image viewer opens it",),
    },
    "needs a process that is killed for its memory": {
        "apps/extraction": (
            "try fewer workers, or a smaller --max-pixels",
            "Give a smaller --shard-size",
        ),
    },
    "of a function of this package, which is asked only where it can answer": {
        "backbone": ("Use get_self_attention, whose weights include it",),
    },
    "of copies with other attention, which test_at_kernel follows": {
        "grafting": (
            "Call model(x, return_attention=True) or model.get_self_attention(x)",
            "Its weights are taken at its kernel",
            "Ask the eager model: compiled._orig_mod.get_self_attention(images)",
            "Pass positions: an int, a slice or a sequence of ints",
        ),
    },
    "the remedy is other code of the user's: there is no call or option that helps": {
        "backbone": (
            "so its weights are taken at its kernel",
            "so its weights are taken at its kernel",
            "so its weights are taken at its kernel",
            "so its weights are taken at its kernel",
            "so its weights are taken at its kernel",
            "so its weights are taken at its kernel",
            "This class keeps its own code",
            "This copy has its own, which stays",
        ),
    },
    "this is a reason that status() shows, and no error": {
        "grafting": ("Its weights are taken at its kernel",),
    },
    "frames of 16384 pixels take too long": {
        "apps/cli": ("Give smaller frames, of at most 16384 pixels a side",),
    },
    "two attention modules are needed: there is no call that makes them": {
        "maps": ("Weights of shared modules cannot be told apart",),
    },
    "needs a copy that upstream has renamed": {"grafting": ("Upstream moved",)},
}
ENTRIES = [
    (area, snippet)
    for areas in TABLE.values()
    for area, snippets in areas.items()
    for snippet in snippets
]
