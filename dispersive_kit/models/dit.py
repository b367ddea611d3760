"""DiT and SiT: one transformer for every objective of the kit, parameters named as in the public checkpoints.

Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748); SiT (2401.08740) is the same.
Time is the kit's: t = 0 data, t = 1 noise. `pretrained.py` converts what the published weights expect.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError
from .conditioning import Conditioned, LabelEmbedder, TimestepEmbedder, check_taps, default_time_scale

# Table 1 of the DiT paper; T is the kit's classroom size.
DIT_CONFIGS: dict[str, dict[str, int]] = {
    "DiT-T": {"depth": 4, "hidden_size": 96, "num_heads": 3},
    "DiT-S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "DiT-B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "DiT-L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "DiT-XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
PATCH_SIZES = (1, 2, 4, 8)


def build_dit(name: str, **overrides: Any) -> "DiT":
    """The model of a published name, "DiT-S/2" or "SiT-S/2"; overrides are keywords of `DiT`."""
    size, _, patch = name.replace("SiT-", "DiT-").partition("/")
    if size not in DIT_CONFIGS or patch not in {str(p) for p in PATCH_SIZES}:
        raise ConfigError(
            f"unknown model {name!r}: the sizes are {', '.join(DIT_CONFIGS)}, each with a patch of "
            f"{', '.join(map(str, PATCH_SIZES))}, for example 'DiT-S/2'"
        )
    return DiT(**{"input_size": 32, "patch_size": int(patch), "in_channels": 4, **DIT_CONFIGS[size], **overrides})


def sincos_2d(dim: int, grid: int) -> Tensor:
    """Fixed position embedding (grid * grid, dim); the first half of the channels codes the column."""
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # (G, dim / 4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (G, dim / 2)
    column, row = axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)
    return torch.cat([column, row], dim=1).float()


def rope_2d(head_dim: int, grid: int) -> tuple[Tensor, Tensor]:
    """cos and sin (grid * grid, head_dim): half of each head turns with the row, half with the column."""
    omega = 10000.0 ** -(torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
    position = torch.arange(grid * grid)
    angle = torch.cat([(position // grid)[:, None] * omega, (position % grid)[:, None] * omega], dim=1)
    angle = angle.repeat(1, 2)  # (N, head_dim)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], dim=-1) * sin.to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]  # (B, N, D)


def make_norm(kind: str, dim: int, affine: bool = False) -> nn.Module:
    if kind == "rms":
        return nn.RMSNorm(dim, eps=1e-6, elementwise_affine=affine)
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=affine)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qk_norm: bool, norm: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = make_norm(norm, dim // num_heads, affine=True) if qk_norm else nn.Identity()
        self.k_norm = make_norm(norm, dim // num_heads, affine=True) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        B, N, D = x.shape
        heads = (B, N, self.num_heads, D // self.num_heads)
        # Split, not permuted and unbound: the gradients of q, k and v are then joined in one pass.
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(x).split(D, dim=-1))  # (B, h, N, d)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Shazeer, arXiv 2002.05202; two thirds of the width keeps the parameter count of the plain MLP."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * (2 * hidden // 3)), nn.Linear(2 * hidden // 3, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class DiTBlock(nn.Module):
    """Transformer block with adaptive layer norm; its gates start at zero, so it starts as the identity."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool, norm: str, mlp: str) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1, self.norm2 = make_norm(norm, dim), make_norm(norm, dim)
        self.attn = Attention(dim, num_heads, qk_norm, norm)
        self.mlp = SwiGLU(dim, hidden) if mlp == "swiglu" else Mlp(dim, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a), rope)
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))  # (B, N, D)


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out: int, norm: str) -> None:
        super().__init__()
        self.norm_final = make_norm(norm, dim)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # Left as a view, the transpose would stay with the residual stream: a strided copy in every layer norm.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # (B, N, D)


class DiT(Conditioned):
    """Diffusion transformer on square images or latents.

    `forward(x, t, y=None, *, r=None, taps=())` takes x (B, C, H, W), t (B,) in [0, 1] and y (B,) long, and
    returns (B, out_channels, H, W); with `taps=(i, ...)` it returns `(out, [z_i, ...])`, z_i (B, N, D) the
    output of block i counted from 0.

    learn_sigma: twice the channels out, the second half for the variance (public SiTs have and drop them).
    time_scale: the embedder sees t * time_scale (1000 for DiT, 1 for SiT); None is `default_time_scale(interval)`.
    interval: also embeds t - r, the second time of MeanFlow; r=None then means r = t, the velocity.
    checkpointing: recomputes each block in backward (non-reentrant; `taps` are outside it), but not in calls
    with r: MeanFlow differentiates them forward, and a block that was cannot be recomputed.
    Raises ConfigError: size not a multiple of the patch, width not of the heads (with rope of 4 times their number),
    t not (B,), label or tap outside its range, y missing or unwanted.
    """

    def __init__(
        self,
        *,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = False,
        time_scale: float | None = None,
        qk_norm: bool = False,
        norm: str = "layer",
        mlp: str = "gelu",
        rope: bool = False,
        interval: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(input_size, patch_size, hidden_size, num_heads, norm, mlp, rope)
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.num_classes, self.class_dropout_prob = num_classes, class_dropout_prob
        self.null_label = num_classes if num_classes and class_dropout_prob > 0 else None
        self.num_heads, self.checkpointing = num_heads, checkpointing
        self.time_scale = default_time_scale(interval) if time_scale is None else time_scale
        grid = input_size // patch_size

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.r_embedder = TimestepEmbedder(hidden_size) if interval else None
        null = self.null_label is not None
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, null) if num_classes else None
        self.pos_embed = nn.Parameter(sincos_2d(hidden_size, grid)[None], requires_grad=False)  # (1, N, D)
        cos, sin = rope_2d(hidden_size // num_heads, grid) if rope else (None, None)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm, norm, mlp) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels, norm)
        self.initialize_weights()

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (self.in_channels, self.input_size, self.input_size)

    def initialize_weights(self) -> None:
        """As published: Xavier, N(0, 0.02) in the embedders, zero in every gate and in the last layer."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.weight.shape[0], -1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        for embedder in (self.t_embedder, self.r_embedder):
            if embedder is not None:
                for layer in (embedder.mlp[0], embedder.mlp[2]):
                    nn.init.normal_(layer.get_parameter("weight"), std=0.02)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[-1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        *,
        r: Tensor | None = None,
        taps: Sequence[int] = (),
    ) -> Any:
        if x.shape[1:] != self.sample_shape:
            shape = ", ".join(map(str, self.sample_shape))
            raise ConfigError(f"the model was built for images (B, {shape}), not {tuple(x.shape)}")
        check_taps(taps, len(self.blocks))
        rope = None if self.rope_cos is None else (self.rope_cos, self.rope_sin)
        c = self.condition(t, y, r)  # (B, D)
        x = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed  # (B, N, D)
        kept = {}
        for i, block in enumerate(self.blocks):
            if self.checkpointing and r is None and torch.is_grad_enabled():
                x = checkpoint(block, x, c, rope, use_reentrant=False)
            else:
                x = block(x, c, rope)
            if i in taps:
                kept[i] = x
        out = self.unpatchify(self.final_layer(x, c))  # (B, out_channels, H, W)
        return (out, [kept[i] for i in taps]) if taps else out

    def unpatchify(self, x: Tensor) -> Tensor:
        B, grid, p = x.shape[0], self.input_size // self.patch_size, self.patch_size
        x = x.reshape(B, grid, grid, p, p, self.out_channels)
        return torch.einsum("bhwpqc->bchpwq", x).reshape(B, self.out_channels, grid * p, grid * p)


def check_sizes(
    input_size: int, patch_size: int, hidden_size: int, num_heads: int, norm: str, mlp: str, rope: bool
) -> None:
    if input_size % patch_size:
        raise ConfigError(f"input_size {input_size} is not a multiple of patch_size {patch_size}: change either")
    if hidden_size % num_heads or hidden_size % 4:
        raise ConfigError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads} and of 4")
    if rope and hidden_size % (4 * num_heads):
        raise ConfigError(f"rope turns channels by fours, and a head of {hidden_size // num_heads} has no such parts")
    if norm not in ("layer", "rms") or mlp not in ("gelu", "swiglu"):
        raise ConfigError(f"norm={norm!r}, mlp={mlp!r}: norm is 'layer' or 'rms', mlp is 'gelu' or 'swiglu'")
