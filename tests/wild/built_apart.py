"""Targets from GitHub whose models need builders or inputs of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.wild.builders import DINOV2, EINOPS, dinov2, dinov3, made_by
from tests.wild.on_github import DINOV2 as UPSTREAM
from tests.wild.on_github import DINOV3, MODELS, PATCHES_OF_14, PI3, UNIDEPTH
from tests.wild.target import GitHub, Target
from tests.wild.weights import images, sharp

DINOMALY = GitHub("guojiajeremy/Dinomaly", "c5c76d01a2bd7212f1c4b7dfdad14902d0f48cfe")
REIN = GitHub("w1oves/Rein", "7da85bcbc36cae6bd6467408cf5fb71fdbbd828c")
PANOPTICON = GitHub("Panopticon-FM/panopticon", "5ad7f82f9d4aa303e630f86d22e3f27304511f29")
CAPI = GitHub("facebookresearch/capi", "98b4fa17ee8eec8810c17022df9a27a44845368b")
MOGE = GitHub("microsoft/MoGe", "07444410f1e33f402353b99d6ccd26bd31e469e8")
UNICEPTION = GitHub("castacks/UniCeption", "802ebc1783d71bbaa9d139c88d87d062ad18ce62")
DEPTH_3 = GitHub("ByteDance-Seed/Depth-Anything-3", "2c21ea849ceec7b469a3e62ea0c0e270afc3281a")
STREAMVGGT = GitHub("wzzheng/StreamVGGT", "3e28c5c5d31128cc45a2f4832245664cb899d764")
RADIO = GitHub("NVlabs/RADIO", "c0f37017930e9dda53f93424cf4bf39fc51f287e")

JAXTYPING = ("jaxtyping==0.3.11", "wadler-lindig==0.1.8")


def build_channel_adaptive() -> nn.Module:
    return dinov2(MODELS, block_chunks=0, in_chans=1, channel_adaptive=True)()


def run_five_channels(model: Any) -> Any:
    return model.forward_features(images(2, 28, 42, channels=5))


def run_training(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a run in training mode, with the same random numbers in every call."""

    def seeded(model: Any) -> Any:
        model.train()
        torch.manual_seed(0)
        return run(model)

    return seeded


def run_crops_of_v3(model: Any) -> Any:
    return model.forward_features([images(8, 32, 48), images(8, 32, 32, seed=2)], [None, None])


def run_batch_of_eight(model: Any) -> Any:
    return model.forward_features(images(8, 28, 42))


def build_text() -> nn.Module:
    from dinov3.eval.text.text_transformer import TextTransformer

    options = {"context_length": 8, "vocab_size": 16, "dim": 48, "num_heads": 3}
    return sharp(TextTransformer(**options, num_layers=2, ffn_ratio=2.0, is_causal=True))


def run_text(model: nn.Module) -> Any:
    return model(torch.arange(16).reshape(2, 8))


def build_dinomaly(mask_neighbor_size: int) -> nn.Module:
    from models.uad import ViTill
    from models.vision_transformer import Attention, Block

    blocks = [Block(dim=48, num_heads=3, qkv_bias=True, attn=Attention) for _ in range(2)]
    model = ViTill(
        encoder=dinov2(MODELS, block_chunks=0)(),
        bottleneck=nn.ModuleList([nn.Identity()]),
        decoder=nn.ModuleList(blocks),
        target_layers=[0, 1],
        fuse_layer_encoder=[[0, 1]],
        fuse_layer_decoder=[[0, 1]],
        mask_neighbor_size=mask_neighbor_size,
    )
    return sharp(model)


def run_square(model: nn.Module) -> Any:
    return model(images(2, 42, 42))


def build_rein(with_reins: bool) -> nn.Module:
    """Build Rein's ViT; its bases from mmengine and mmseg are stubbed."""
    from rein.models.backbones.reins import Reins
    from rein.models.backbones.reins_dinov2 import ReinsDinoVisionTransformer

    plain = ReinsDinoVisionTransformer.__mro__[1]
    options = {**DINOV2, "init_values": 1.0, "block_chunks": 0, "out_indices": [0, 1]}
    cls = ReinsDinoVisionTransformer if with_reins else plain
    model = cls(**options)
    if with_reins:
        model.reins = Reins(num_layers=2, embed_dims=48, patch_size=14, token_length=5)
    return sharp(model)


def enter_rein() -> None:
    """Enter a base class and a registry in the place of mmengine's and mmseg's."""
    import sys

    sys.modules["mmengine.model"].BaseModule = _BaseModule  # type: ignore[attr-defined]


class _BaseModule(nn.Module):
    def __init__(self, init_cfg: Any = None) -> None:
        super().__init__()


def build_panopticon() -> nn.Module:
    model = dinov2(
        MODELS,
        block_chunks=0,
        embed_layer="PanopticonPE",
        pe_args={"attn_dim": 48, "chnfus_cfg": {"attn_cfg": {"num_heads": 3}}},
    )
    return model()


def run_panopticon(model: Any) -> Any:
    channels = torch.tensor([[450.0, 550.0, 650.0, -1.0]]).repeat(2, 1)  # nm; -1 is radar
    return model.forward_features({"imgs": images(2, 28, 28, channels=4), "chn_ids": channels})


def build_capi() -> nn.Module:
    from model import EncoderDecoder

    encoder = {"embed_dim": 48, "depth": 2, "drop_path_rate": 0.0}
    attention = {"attn_kwargs": {"num_heads": 3}}
    model = EncoderDecoder(
        n_registers=4,
        transformers_kwargs={"block_kwargs": attention},
        encoder_kwargs=encoder,
        decoder_kwargs=encoder,
    )
    model.init_weights()
    frequencies = [m.freqs.clone() for m in model.modules() if hasattr(m, "freqs")]
    sharp(model)
    with torch.no_grad():  # the rotation's own numbers
        for module in (m for m in model.modules() if hasattr(m, "freqs")):
            module.freqs.copy_(frequencies.pop(0))
    return model


def build_moge(swapped: bool) -> nn.Module:
    from moge.model.modules import DINOv2Encoder

    model = DINOv2Encoder("dinov2_vits14", intermediate_layers=2, dim_out=8)
    model.backbone.blocks = model.backbone.blocks[:2]
    if swapped:
        model.enable_pytorch_native_sdpa()
    return sharp(model)


def run_moge(model: nn.Module) -> Any:
    return model(images(2, 28, 42), 2, 3)


def build_uniception_encoder() -> nn.Module:
    """Build UniCeption's encoder; torch.hub gives it MoGe's copy of DINOv2's class."""
    from uniception.models.encoders.dinov2 import DINOv2Encoder

    small = made_by(
        "dinov2.models.vision_transformer",
        **{**DINOV2, "embed_dim": 384, "num_heads": 6, "init_values": 1.0, "block_chunks": 0},
    )
    before, torch.hub.load = torch.hub.load, lambda *_, **__: small()
    try:
        return sharp(DINOv2Encoder("dinov2", size="small", torch_hub_pretrained=False))
    finally:
        torch.hub.load = before


def run_inner_features(model: Any) -> Any:
    return model.model.forward_features(images(2, 28, 42))


def build_sharing(module: str, cls: str, **options: Any) -> nn.Module:
    """Build a transformer of UniCeption that shares information between views."""
    size = {"dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}
    return made_by(
        f"uniception.models.info_sharing.{module}",
        cls,
        **{"name": "small", "input_embed_dim": 48, **size, **options},
    )()


def run_sharing(model: nn.Module) -> Any:
    from uniception.models.info_sharing.base import MultiViewTransformerInput

    views = [images(2, 2, 3, channels=48, seed=seed) for seed in (1, 2)]
    torch.manual_seed(0)  # it draws the positions of views
    return model(MultiViewTransformerInput(features=views)).features


class _WithPositions(nn.Module):
    """Blocks of a decoder in a row, with the positions of a grid of 2 x 3 in each."""

    def __init__(self, blocks: list[nn.Module], positions: Tensor, argument: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.positions = positions
        self.argument = argument

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, **{self.argument: self.positions})
        return x


def grid_positions() -> Tensor:
    return torch.cartesian_prod(torch.arange(2), torch.arange(3))[None].expand(2, -1, -1)


def build_pi3_decoder() -> nn.Module:
    from pi3.models.layers.attention import FlashAttentionRope
    from pi3.models.layers.block import BlockRope
    from pi3.models.layers.pos_embed import RoPE2D

    options = {"dim": 48, "num_heads": 3, "qk_norm": True, "qkv_bias": True, "rope": RoPE2D()}
    blocks = [BlockRope(**options, attn_class=FlashAttentionRope) for _ in range(2)]
    return sharp(_WithPositions(blocks, grid_positions(), "xpos"))


def build_vggt_blocks(module: str) -> nn.Module:
    import importlib

    block = importlib.import_module(f"{module}.layers.block").Block
    rope = importlib.import_module(f"{module}.layers.rope").RotaryPositionEmbedding2D
    options = {"dim": 48, "num_heads": 3, "qk_norm": True, "rope": rope(), "init_values": 1.0}
    return sharp(_WithPositions([block(**options) for _ in range(2)], grid_positions(), "pos"))


def build_unidepth_decoder() -> nn.Module:
    from unidepth.layers.attention import AttentionBlock

    return sharp(nn.Sequential(*(AttentionBlock(48, num_heads=3) for _ in range(2))))


def build_magneto() -> nn.Module:
    from radio.vision_transformer_xpos import VisionTransformer

    return sharp(VisionTransformer(32, 16, 48, num_layers=2, num_heads=3))


def run_tokens(model: nn.Module) -> Any:
    return model(images(2, 2, 3, channels=48).flatten(2).transpose(1, 2))


def run_views(model: Any) -> Any:
    return model.get_intermediate_layers(images(4, 28, 42).unflatten(0, (2, 2)), n=2)


REIN_STUBS = ("mmseg.models.builder", "mmengine.model")
REIN_BARE = ("rein", "rein.models", "rein.models.backbones")
SHARING_BARE = ("uniception", "uniception.models", "uniception.models.info_sharing")


def _sharing(name: str, differs: str, module: str, cls: str, **options: Any) -> Target:
    return Target(
        f"uniception-{name}",
        UNICEPTION,
        differs,
        partial(build_sharing, module, cls, **options),
        run_sharing,
        bare=SHARING_BARE,
        needs=JAXTYPING,
    )


BUILT_APART = [
    Target(
        "dinov2-training",
        UPSTREAM,
        "stochastic depth drops samples",
        dinov2(MODELS, block_chunks=0, drop_path_rate=0.4),
        run_training(run_batch_of_eight),
    ),
    Target(
        "dinov2-channel-adaptive",
        GitHub("emondaca/dinov2_EMC", "b0ca6fd8f2bb21944ff90675ba4f9ce72616d963"),
        "channels go into the batch",
        build_channel_adaptive,
        run_five_channels,
    ),
    Target(
        "dinov3-training",
        DINOV3,
        "two crops and stochastic depth: forward_list, and never forward",
        dinov3("dinov3.models.vision_transformer", drop_path_rate=0.4),
        run_training(run_crops_of_v3),
    ),
    Target("dinov3-text", DINOV3, "causal", build_text, run_text, bare=("dinov3.eval.text",)),
    Target(
        "dinomaly",
        DINOMALY,
        "attention returns (x, attn); a decoder of another class",
        partial(build_dinomaly, 0),
        run_square,
        stubs=("sklearn.cluster",),
    ),
    Target(
        "dinomaly-neighbours",
        DINOMALY,
        "the decoder writes zeros into the weights after the softmax",
        partial(build_dinomaly, 1),
        run_square,
        stubs=("sklearn.cluster",),
    ),
    Target(
        "rein-plain",
        REIN,
        "forward_features returns a list",
        partial(build_rein, False),
        PATCHES_OF_14,
        stubs=REIN_STUBS,
        bare=REIN_BARE,
    ),
    Target(
        "rein",
        REIN,
        "attention to learned tokens after every block",
        partial(build_rein, True),
        PATCHES_OF_14,
        stubs=REIN_STUBS,
        bare=REIN_BARE,
    ),
    Target(
        "panopticon",
        PANOPTICON,
        "a dict of images; cross attention over channels before the blocks",
        build_panopticon,
        run_panopticon,
    ),
    Target(
        "capi",
        CAPI,
        "separate projections, rotation, a predictor with cross attention",
        build_capi,
        needs=(*JAXTYPING, EINOPS),
        stubs=("omegaconf", "rich.logging", "sklearn.decomposition", "sklearn.preprocessing"),
    ),
    Target(
        "moge-2",
        MOGE,
        "the class of each block's attention is swapped",
        partial(build_moge, True),
        run_moge,
        bare=("moge", "moge.model"),
        stubs=("utils3d",),
    ),
    Target(
        "uniception-dinov2",
        UNICEPTION,
        "the class of each block's attention is swapped",
        build_uniception_encoder,
        run_inner_features,
        bare=("uniception", "uniception.models", "uniception.models.encoders"),
        needs=(*JAXTYPING, "dinov2==0.0.1.dev2"),
    ),
    _sharing(
        "alternating",
        "views in turn one by one and together",
        "alternating_attention_transformer",
        "MultiViewAlternatingAttentionTransformer",
    ),
    _sharing(
        "entropy",
        "q/k norm, queries scaled by the number of tokens",
        "global_attention_transformer",
        "MultiViewGlobalAttentionTransformer",
        qk_norm=True,
        use_entropy_scaling=True,
    ),
    _sharing(
        "cross",
        "self and cross attention",
        "cross_attention_transformer",
        "MultiViewCrossAttentionTransformer",
        num_views=2,
    ),
    _sharing(
        "differential",
        "differential attention: two kernel calls in one forward",
        "diff_cross_attention_transformer",
        "DifferentialMultiViewCrossAttentionTransformer",
        num_views=2,
    ),
    Target(
        "pi3-decoder",
        PI3,
        "q/k norm, rotation, sdpa_kernel([MATH])",
        build_pi3_decoder,
        run_tokens,
        bare=("pi3", "pi3.models", "pi3.models.layers"),
        needs=(EINOPS,),
    ),
    Target(
        "vggt-aggregator",
        STREAMVGGT,
        "VGGT's blocks: q/k norm, rotation",
        partial(build_vggt_blocks, "vggt"),
        run_tokens,
        path="src",
        needs=(EINOPS,),
    ),
    Target(
        "streamvggt",
        STREAMVGGT,
        "the same with masks and a cache of keys",
        partial(build_vggt_blocks, "streamvggt"),
        run_tokens,
        path="src",
        needs=(EINOPS,),
    ),
    Target(
        "unidepth-decoder",
        UNIDEPTH,
        "projections q and kv, own names",
        build_unidepth_decoder,
        run_tokens,
        bare=("unidepth", "unidepth.layers"),
        needs=(EINOPS,),
    ),
    Target(
        "depth-anything-3-main",
        DEPTH_3,
        "q/k norm and rotation from block 1 on, pairs of views",
        made_by(
            "depth_anything_3.model.dinov2.vision_transformer",
            **{**DINOV2, "init_values": 1.0},
            **{"alt_start": 1, "qknorm_start": 1, "rope_start": 1, "cat_token": False},
        ),
        run_views,
        path="src",
        bare=("depth_anything_3", "depth_anything_3.model", "depth_anything_3.model.dinov2"),
        needs=(EINOPS,),
    ),
]
