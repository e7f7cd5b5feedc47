"""Small seeded modules and models of the tested classes, with parameters of order one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dinov2_attn.backbone.contract import options_of
from dinov2_attn.backbone.structure import Role
from dinov2_attn.proof.conformance.code import Code


class Place:
    """Where modules and tensors of the suite are: what ``--device`` says."""

    device = torch.device("cpu")


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal noise that depends on the arguments only."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values.to(Place.device, dtype)


def randomise(module: Any, seed: int) -> Any:
    """Fill the parameters with noise. New modules attend almost uniformly, which hides errors."""
    module = module.to(Place.device)
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            values = noise(*parameter.shape, seed=seed + i)
            parameter.requires_grad_().copy_(values / parameter.shape[-1] ** 0.5)
    return module.eval()


def make(cls: Any, **options: Any) -> Any:
    """Build ``cls`` with those options that this revision has."""
    known = options_of(cls)
    return cls(**{name: value for name, value in options.items() if name in known})


@dataclass(frozen=True)
class AttentionCase:
    """The sizes of one attention module and its tokens; printed in the names of tests."""

    heads: int
    head_dim: int
    batch: int
    length: int
    dtype: torch.dtype = torch.float64
    qkv_bias: bool = True
    seed: int = 0

    def __str__(self) -> str:
        shape = f"{self.heads}x{self.head_dim}-{self.batch}x{self.length}"
        return f"{shape}-{str(self.dtype).removeprefix('torch.')}"

    def build(self, cls: type, **options: Any) -> tuple[Any, Tensor]:
        """Return a module of ``cls`` in evaluation mode, and tokens."""
        dim = self.heads * self.head_dim
        module = make(cls, dim=dim, num_heads=self.heads, qkv_bias=self.qkv_bias, **options)
        tokens = noise(self.batch, self.length, dim, seed=self.seed, dtype=self.dtype)
        return randomise(module.double(), self.seed).to(self.dtype), tokens


# All sizes of a case differ, so that swapped dimensions fail. The last case is longer than any
# window or tile.
ATTENTION_CASES = (
    AttentionCase(3, 5, 2, 11, seed=7),
    AttentionCase(2, 4, 3, 7, qkv_bias=False, seed=1),
    AttentionCase(1, 1, 1, 2, seed=2),
    AttentionCase(4, 3, 1, 1, seed=3),
    AttentionCase(2, 8, 3, 17, torch.float32, seed=4),
    AttentionCase(3, 4, 2, 9, torch.bfloat16, seed=5),
    AttentionCase(2, 3, 1, 263, seed=6),
)
PLAIN = ATTENTION_CASES[0]


@dataclass(frozen=True)
class ModelCase:
    """The sizes of one vision transformer and its images, which are never square."""

    depth: int = 2
    chunks: int = 0
    registers: int = 0
    heads: int = 2
    grid: tuple[int, int] = (2, 3)
    batch: int = 2
    dtype: torch.dtype = torch.float64
    seed: int = 0

    patch = 2
    side = 4  # of the image of the positional embedding, in patches

    def __str__(self) -> str:
        rows, columns = self.grid
        return f"depth{self.depth}-chunks{self.chunks}-reg{self.registers}-{rows}x{columns}"

    def build(self, code: Code, cls: type, **options: Any) -> Any:
        """Return a model of ``cls`` with the most derived classes of block and attention."""
        block, attention = map(code.most_derived, (Role.BLOCK, Role.ATTENTION))
        if block is not None:
            taken = "attn_class" in options_of(block) and attention is not None
            options["block_fn"] = partial(block, attn_class=attention) if taken else block
        model = make(
            cls,
            img_size=self.side * self.patch,
            patch_size=self.patch,
            embed_dim=4 * self.heads,
            depth=self.depth,
            num_heads=self.heads,
            mlp_ratio=2,
            init_values=1.0,
            block_chunks=self.chunks,
            num_register_tokens=self.registers,
            **self._of_dinov3,
            **options,
        )
        if hasattr(model, "rope_embed"):
            _fill_buffers(model)
        return randomise(model.double(), self.seed).to(self.dtype)

    @property
    def _of_dinov3(self) -> dict[str, Any]:
        """The same sizes by DINOv3's names."""
        return {
            "ffn_ratio": 2,
            "layerscale_init": 1.0,
            "n_storage_tokens": self.registers,
            "mask_k_bias": self.seed % 2 == 1,
            "pos_embed_rope_dtype": "fp32" if self.batch == 1 else "bf16",
        }

    def flat(self) -> ModelCase:
        """Return the same model without chunks."""
        return replace(self, chunks=0)

    @property
    def patches(self) -> int:
        """The number of patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def places(self) -> list[tuple[int, int]]:
        """The patches as (row, column), row by row."""
        return [(row, column) for row in range(self.grid[0]) for column in range(self.grid[1])]

    @property
    def images(self) -> Tensor:
        """The images of the case."""
        height, width = (cells * self.patch for cells in self.grid)
        return noise(self.batch, 3, height, width, seed=self.seed, dtype=self.dtype)

    @property
    def masks(self) -> Tensor:
        """Masks for the images, about half of the patches."""
        return noise(self.batch, self.patches, seed=self.seed + 1) > 0


def _fill_buffers(model: Any) -> None:
    """Fill the buffers of a DINOv3, which are NaN at first.

    Its ``init_weights`` left those out that mask the bias of keys, until commit 2bfe092.
    """
    model.init_weights()
    for module in model.modules():
        if hasattr(module, "bias_mask"):
            module.bias_mask.fill_(1).view(3, -1)[1] = 0


MODEL_CASES = (
    ModelCase(grid=(2, 3)),
    ModelCase(depth=3, registers=3, heads=3, grid=(5, 2), seed=1),
    ModelCase(depth=4, chunks=2, registers=1, grid=(1, 4), batch=3, seed=2),
    ModelCase(depth=3, chunks=3, heads=1, grid=(3, 1), dtype=torch.float32, seed=3),
    ModelCase(depth=2, chunks=1, registers=4, grid=(3, 7), batch=1, seed=4),
)


def prefix(model: Any) -> int:
    """Return the number of tokens before the patches: CLS and the registers."""
    registers = registers_of(model)
    return 1 + (0 if registers is None else registers.shape[1])


def registers_of(model: Any) -> Any:
    """Return the register tokens ``(1, R, C)`` of DINOv2, or the storage tokens of DINOv3."""
    names = ("register_tokens", "storage_tokens")
    return next((t for t in (getattr(model, n, None) for n in names) if t is not None), None)
