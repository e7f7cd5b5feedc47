"""Ways in which copies of upstream went wrong, or may, each as a change of a line or two.

Most were found in the wild: hand patches that return A·V·Vᵀ or features, arguments that drift
into another's place, norms and rotations before the kernel, dropout in evaluation, registers
and grids in another order. The rest are their neighbours.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

from dinov2_attn._download import fetch_wheel
from tests.support.upstreams import ANOMALIB, DEPTH_ANYTHING, FIRST, Upstream


@dataclass(frozen=True)
class Mutation:
    """What is changed where, which file of the suite sees it, and words of the reason it gives."""

    name: str
    upstream: Upstream
    module: str
    changes: dict[str, str]
    caught_by: str
    reason: str

    def __str__(self) -> str:
        return self.name

    def apply(self, folder: Path) -> Path:
        """Put a mutated copy of the wheel's package into ``folder``."""
        unpack(self.upstream, folder)
        file = folder / (self.module.replace(".", "/") + ".py")
        text = file.read_text()
        for old, new in self.changes.items():
            assert old in text, f"nothing to change in {self.module}: {old}"
            text = text.replace(old, new)
        file.write_text(text)
        return folder


def unpack(upstream: Upstream, folder: Path) -> None:
    """Unpack the package alone, and hide xFormers, which takes long to import."""
    with zipfile.ZipFile(fetch_wheel(upstream.wheel)) as wheel:
        inside = upstream.package.replace(".", "/") + "/"
        wheel.extractall(folder, [n for n in wheel.namelist() if n.startswith(inside)])
    # A name in sys.modules would do, but this is another process.
    (folder / "xformers.py").write_text("raise ImportError('hidden by a test')\n")


ATTENTION, BLOCK, MODEL = FIRST.attention, FIRST.block, FIRST.model
EMBED = "dinov2.layers.patch_embed"
SPLIT = "qkv[0] * self.scale, qkv[1], qkv[2]"
SOFTMAX = "attn.softmax(dim=-1)"

NO_WEIGHTS = "expected the weights of shape"
UNFAITHFUL = r"expected proj\(weights @ v\) = features"


def _first(name, module, old, new, caught_by, reason):
    return Mutation(name, FIRST, module, {old: new}, caught_by, reason)


def _newest(name, module, old, new, caught_by, reason):
    return Mutation(name, ANOMALIB, module, {old: new}, caught_by, reason)


def _registers(name, changes, caught_by, reason):
    return Mutation(name, DEPTH_ANYTHING, DEPTH_ANYTHING.model, changes, caught_by, reason)


# No kernel is called whose weights could be taken.
REFUSED = [
    _first(
        "softmax over queries",
        ATTENTION,
        SOFTMAX,
        "attn.softmax(dim=-2)",
        "test_install",
        "expected .* to call one kernel once",
    ),
]

# What install() accepts, because the weights of the kernel are right, and what a copy itself
# returns or says is not.
OWN_ANSWERS = [
    _first(
        "the popular x @ v.T, by hand",
        ATTENTION,
        "def forward(self, x: Tensor, attn_bias=None) -> Tensor:",
        "def forward(self, x: Tensor, attn_bias=None, return_attn=False) -> Tensor:\n"
        "        if return_attn:\n"
        "            return self(x) @ self.qkv(x).chunk(3, -1)[2].transpose(1, 2)",
        "test_faithful",
        NO_WEIGHTS,
    ),
    _first(
        "a block that returns features when asked for attention, by hand",
        BLOCK,
        "def forward(self, x: Tensor) -> Tensor:",
        "def forward(self, x: Tensor, return_attention=False) -> Tensor:",
        "test_agreement",
        "the weights of a block = those of its pass",
    ),
    _first(
        "a model whose get_last_self_attention returns features, by hand",
        MODEL,
        "    def forward(self, *args, is_training",
        "    def get_last_self_attention(self, x, masks=None):\n"
        "        return self.forward_features(x, masks)['x_prenorm']\n\n"
        "    def forward(self, *args, is_training",
        "test_agreement",
        "expected the last",
    ),
    _newest(
        "positional drift: return_attn where is_causal was, by hand",
        ANOMALIB.attention,
        "x: torch.Tensor, is_causal: bool = False",
        "x: torch.Tensor, return_attn: bool = False, is_causal: bool = False",
        "test_faithful",
        NO_WEIGHTS,
    ),
    _newest(
        "causal whether asked or not",
        ANOMALIB.attention,
        "is_causal=is_causal",
        "is_causal=True",
        "test_agreement",
        "expected it to be causal where it is told so",
    ),
    _first(
        "a chunk that lacks its first block",
        MODEL,
        "blocks_list[i : i + chunksize]",
        "blocks_list[i + 1 : i + chunksize]",
        "test_agreement",
        "expected an answer for each block",
    ),
    _registers(
        "one register more than is said",
        {"torch.zeros(1, num_register_tokens,": "torch.zeros(1, num_register_tokens + 1,"},
        "test_layout",
        "expected as many register_tokens as asked for",
    ),
]

# What install() cannot see: other sizes, other modes, other orders than those of its proof.
SEEN_BY_THE_SUITE = [
    _first(
        "another temperature in training",
        ATTENTION,
        SOFTMAX,
        "(attn / (1 + self.training)).softmax(dim=-1)",
        "test_faithful",
        UNFAITHFUL,
    ),
    _first(
        "a window where there are many tokens",
        ATTENTION,
        SOFTMAX,
        "(attn.tril(64).triu(-64) if N > 256 else attn).softmax(dim=-1)",
        "test_faithful",
        UNFAITHFUL,
    ),
    _first(
        "half precision where float32 was",
        ATTENTION,
        SOFTMAX,
        "(attn.bfloat16() if attn.element_size() == 4 else attn).softmax(dim=-1).to(x.dtype)",
        "test_faithful",
        UNFAITHFUL,
    ),
    _newest(
        "dropout in evaluation",
        ANOMALIB.attention,
        "self.attn_drop if self.training else 0.0",
        "self.attn_drop",
        "test_faithful",
        UNFAITHFUL,
    ),
    _newest(
        "a causal block that is causal whatever it was told",
        ANOMALIB.block,
        "(x), self.is_causal)",
        "(x), True)",
        "test_agreement",
        "the weights of a causal block = its pass",
    ),
    _first(
        "chunks padded by one too many",
        MODEL,
        "[nn.Identity()] * i",
        "[nn.Identity()] * (i + 1)",
        "test_agreement",
        "expected blocks to keep their number",
    ),
    _first(
        "the patch grid column by column",
        EMBED,
        "x.flatten(2)",
        "x.transpose(2, 3).flatten(2)",
        "test_layout",
        r"expected the patch of row 0, column 1 of a grid \(2, 5\) at token 2; found it at .3",
    ),
    _first(
        "CLS behind the patches",
        MODEL,
        "(self.cls_token.expand(x.shape[0], -1, -1), x)",
        "(x, self.cls_token.expand(x.shape[0], -1, -1))",
        "test_layout",
        r"expected CLS \(100\) and registers",
    ),
    _first(
        "the positional embedding transposed",
        MODEL,
        "dim).permute(0, 3, 1, 2)",
        "dim).permute(0, 3, 2, 1)",
        "test_layout",
        "expected the row's own value all along a row",
    ),
    _first(
        "height and width exchanged",
        MODEL,
        "B, nc, w, h = x.shape",
        "B, nc, h, w = x.shape",
        "test_layout",
        "expected the row's own value all along a row",
    ),
    _first(
        "masks inverted",
        MODEL,
        "torch.where(masks",
        "torch.where(~masks",
        "test_layout",
        "expected a mask on patch 0 to change token 1",
    ),
    _first(
        "layers reshaped to a grid of width by height",
        MODEL,
        "w // self.patch_size, h // self.patch_size, -1",
        "h // self.patch_size, w // self.patch_size, -1",
        "test_layout",
        r"expected the patches of the last layer, \(B, C, h, w\)",
    ),
    _registers(
        "registers before CLS",
        {"x[:, :1],": "x[:, :0],", "x[:, 1:],": "x,"},
        "test_layout",
        r"expected CLS \(100\) and registers .*found \[101",
    ),
    _registers(
        "registers behind the patches",
        {"x[:, :1],": "x,", "x[:, 1:],": "x[:, :0],"},
        "test_layout",
        r"expected CLS \(100\) and registers",
    ),
    _registers(
        "patch features that begin one register early",
        {"self.num_register_tokens + 1 :": "self.num_register_tokens :"},
        "test_layout",
        "expected x_norm_patchtokens of shape",
    ),
    _registers(
        "layers that begin one register early",
        {"1 + self.num_register_tokens:": "self.num_register_tokens:"},
        "test_layout",
        "expected the patches of the last layer of shape",
    ),
]

MUTATIONS = [*REFUSED, *OWN_ANSWERS, *SEEN_BY_THE_SUITE]

# Another model, and its weights are right: the suite must not cry wolf.
HARMLESS = [
    _first(
        "another scale, kept where it was",
        ATTENTION,
        "self.scale = head_dim**-0.5",
        "self.scale = dim**-0.5",
        "test_faithful",
        "passed",
    ),
    _first(
        "blocks whose attention counts twice",
        BLOCK,
        "x = x + attn_residual_func(x)",
        "x = x + 2 * attn_residual_func(x)",
        "test_agreement",
        "passed",
    ),
    # Other attention than upstream's, whose weights are taken at the kernel.
    _first(
        "a norm of queries and keys",
        ATTENTION,
        SPLIT,
        "nn.functional.normalize(qkv[0], dim=-1), nn.functional.normalize(qkv[1], dim=-1), qkv[2]",
        "test_faithful",
        "passed",
    ),
    _first(
        "a rotation of queries and keys",
        ATTENTION,
        "attn = q @ k.transpose(-2, -1)",
        "turn = x.new_tensor(range(N))[:, None]\n"
        "        q, k = (t * turn.cos() + t.roll(1, -1) * turn.sin() for t in (q, k))\n"
        "        attn = q @ k.transpose(-2, -1)",
        "test_faithful",
        "passed",
    ),
    _first(
        "no scale",
        ATTENTION,
        "qkv[0] * self.scale",
        "qkv[0]",
        "test_faithful",
        "passed",
    ),
    _first(
        "the scale of all heads together",
        ATTENTION,
        "qkv[0] * self.scale",
        "qkv[0] * C**-0.5",
        "test_faithful",
        "passed",
    ),
    _first(
        "scaled twice, before xFormers' kernel",
        ATTENTION,
        "memory_efficient_attention(q, k, v, attn",
        "memory_efficient_attention(q * self.scale, k, v, attn",
        "test_faithful",
        "passed",
    ),
    _first(
        "keys before queries",
        ATTENTION,
        SPLIT,
        "qkv[1] * self.scale, qkv[0], qkv[2]",
        "test_faithful",
        "passed",
    ),
    _first(
        "heads before thirds in the projection",
        ATTENTION,
        "3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)",
        "self.num_heads, 3, C // self.num_heads).permute(3, 0, 2, 1, 4)",
        "test_faithful",
        "passed",
    ),
    _first(
        "heads merged without turning back",
        ATTENTION,
        "(attn @ v).transpose(1, 2)",
        "(attn @ v)",
        "test_faithful",
        "passed",
    ),
    _first(
        "a bias that hides CLS",
        ATTENTION,
        SOFTMAX,
        "(attn - 9.0 * x.new_tensor([1] + [0] * (N - 1))).softmax(dim=-1)",
        "test_faithful",
        "passed",
    ),
    _first(
        "the norm after the attention",
        BLOCK,
        "self.ls1(self.attn(self.norm1(x)))",
        "self.ls1(self.norm1(self.attn(x)))",
        "test_agreement",
        "passed",
    ),
]
