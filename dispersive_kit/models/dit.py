"""DiT and SiT: one transformer for every objective of the kit, parameters named as in the public checkpoints.

Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748); SiT (2401.08740) is the same.
Time is as in the whole kit: t = 0 is data, t = 1 is noise. `published.py` converts it for the published weights.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dispersive_kit.errors import ConfigError

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
    """The model of a published name, "DiT-S/2" or "SiT-S/2"; overrides are keywords of `DiT`.

    Raises ConfigError: no such size or patch; or as `DiT`.
    """
    size, _, patch = name.replace("SiT-", "DiT-").partition("/")
    if size not in DIT_CONFIGS or patch not in {str(p) for p in PATCH_SIZES}:
        raise ConfigError(
            f"unknown model {name!r}: the sizes are {', '.join(DIT_CONFIGS)}, each with a patch of "
            f"{', '.join(map(str, PATCH_SIZES))}, for example 'DiT-S/2'"
        )
    return DiT(**{"input_size": 32, "patch_size": int(patch), "in_channels": 4, **DIT_CONFIGS[size], **overrides})


class Conditioned(nn.Module):
    """Blocks with taps, conditioned on the time t, with `r_embedder` also on t - r, with `y_embedder` on the class.

    The class table has a null row at `null_label`, for guidance, unless that is None.
    """

    blocks: nn.ModuleList

    def _embed(
        self, hidden_size: int, num_classes: int, null_label: int | None, time_scale: float | None, *, interval: bool
    ) -> None:
        self.num_classes, self.null_label = num_classes, null_label
        # 1000 as in DiT; 1 for MeanFlow, whose target contains the model's derivative in t, proportional to this scale:
        # with 1000 a DiT-T/2 does not learn digits in 300 steps, and with 1 it does (tests/training/test_extras.py).
        self.time_scale = (1.0 if interval else 1000.0) if time_scale is None else time_scale
        self.t_embedder = _TimestepEmbedder(hidden_size)
        self.r_embedder = _TimestepEmbedder(hidden_size) if interval else None
        self.y_embedder = _LabelEmbedder(num_classes + (null_label is not None), hidden_size) if num_classes else None

    def condition(self, t: Tensor, y: Tensor | None, r: Tensor | None) -> Tensor:
        """c (B, D) from t, r and y, (B,) each."""
        if t.ndim != 1:
            raise ConfigError(f"t is {tuple(t.shape)}: give one time for each image, (B,)")
        c = self.t_embedder(t * self.time_scale)
        if self.r_embedder is not None:
            c = c + self.r_embedder((torch.zeros_like(t) if r is None else t - r) * self.time_scale)
        elif r is not None:
            raise ConfigError("the model was given r, but has no embedder for t - r: build it with interval=True")
        if (self.y_embedder is None) != (y is None):
            given = "no labels" if y is None else "labels"
            raise ConfigError(
                f"the model has {self.num_classes} classes and was given {given}: give y=None to a model without "
                f"classes, and labels to any other (null_label={self.null_label} for no class)"
            )
        return c if self.y_embedder is None else c + self.y_embedder(y)

    def _through_blocks(
        self, x: Tensor, c: Tensor, taps: Sequence[int], *, recompute: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """x after all blocks, and after each block in `taps`; recompute: in backward, to save memory."""
        depth = len(self.blocks)
        if outside := [i for i in taps if not 0 <= i < depth]:
            raise ConfigError(f"there is no block {outside[0]}: taps are counted from 0 to {depth - 1}")
        kept = {}
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, c, use_reentrant=False) if recompute else block(x, c)
            if i in taps:
                kept[i] = x
        return x, [kept[i] for i in taps]


class _TimestepEmbedder(nn.Module):
    """256 sinusoids of a time, in float32 at least (bf16 does not have all integers up to 1000), then two layers."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        t = t if t.dtype == torch.float64 else t.float()
        omega = torch.exp(-math.log(10000.0) / 128 * torch.arange(128, device=t.device, dtype=t.dtype))
        angle = t[:, None] * omega  # (B, 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(next(self.parameters()).dtype))  # (B, D)


class _LabelEmbedder(nn.Module):
    def __init__(self, rows: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        # On a GPU this check would cost a synchronisation in each step, and the kernel has its own assertion.
        if not torch.compiler.is_compiling() and y.device.type == "cpu" and y.numel():
            low, high, last = int(y.min()), int(y.max()), self.embedding_table.num_embeddings - 1
            if low < 0 or high > last:
                raise ConfigError(
                    f"label {low if low < 0 else high} is outside 0..{last}, the model's "
                    "class table (the null class included): check num_classes against the data set"
                )
        return self.embedding_table(y)  # (B, D)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's x (1 + scale) + shift: x (B, N, D), shift and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def _norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        heads = (B, N, self.num_heads, D // self.num_heads)
        # Split, not permuted and unbound, so that backward joins the gradients of q, k and v in one pass.
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(x).split(D, dim=-1))  # (B, h, N, d)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class _Block(nn.Module):
    """Transformer block with adaptive layer norm; its gates start at zero, so it starts as the identity."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(dim), _norm(dim)
        self.attn = _Attention(dim, num_heads)
        layers = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU("tanh"), "fc2": nn.Linear(4 * dim, dim)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(_modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(_modulate(self.norm2(x), shift_m, scale_m))  # (B, N, D)


class _FinalLayer(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm_final = _norm(dim)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(_modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class _PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # Without contiguous() the residual stream stays transposed, and every layer norm makes a strided copy.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # (B, N, D)


class DiT(Conditioned):
    """Diffusion transformer on square images or latents.

    `forward(x, t, y=None, *, r=None, taps=())` takes x (B, C, H, W), t (B,) in [0, 1] and y (B,) long, and
    returns (B, out_channels, H, W); with `taps=(i, ...)` it returns `(out, [z_i, ...])`, z_i (B, N, D) the
    output of block i counted from 0.

    learn_sigma: twice the output channels, the second half for the variance (public SiTs have it and drop it).
    time_scale: the embedder receives t * time_scale; None is 1000 as in DiT, or 1 with `interval`.
    interval: also embeds t - r, the second time of MeanFlow; r=None then means r = t, the velocity.
    checkpointing: recomputes each block in backward (non-reentrant; `taps` are outside it), but not in calls
    with r: MeanFlow uses forward-mode differentiation, which does not work with recomputation.
    Raises ConfigError: size not a multiple of the patch, width not a multiple of the heads and of 4, x of another
        shape, t not (B,), label or tap outside its range, y missing, y or r not expected.
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
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = False,
        time_scale: float | None = None,
        interval: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise ConfigError(f"input_size {input_size} is not a multiple of patch_size {patch_size}: change either")
        if hidden_size % num_heads or hidden_size % 4:
            raise ConfigError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads} and of 4")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.sample_shape = in_channels, input_size, input_size
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.num_heads, self.checkpointing = num_heads, checkpointing
        self.x_embedder = _PatchEmbed(patch_size, in_channels, hidden_size)
        null_label = num_classes if num_classes and class_dropout_prob > 0 else None
        self._embed(hidden_size, num_classes, null_label, time_scale, interval=interval)
        pos_embed = _sincos_2d(hidden_size, input_size // patch_size)[None]
        self.pos_embed = nn.Parameter(pos_embed, requires_grad=False)  # (1, N, D)
        self.blocks = nn.ModuleList(_Block(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = _FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        self.initialize_weights()

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
        self, x: Tensor, t: Tensor, y: Tensor | None = None, *, r: Tensor | None = None, taps: Sequence[int] = ()
    ) -> Any:
        if x.shape[1:] != self.sample_shape:
            shape = ", ".join(map(str, self.sample_shape))
            raise ConfigError(f"the model was built for images (B, {shape}), not {tuple(x.shape)}")
        c = self.condition(t, y, r)  # (B, D)
        x = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed  # (B, N, D)
        recompute = self.checkpointing and r is None and torch.is_grad_enabled()
        x, tapped = self._through_blocks(x, c, taps, recompute=recompute)
        out = self._unpatchify(self.final_layer(x, c))  # (B, out_channels, H, W)
        return (out, tapped) if taps else out

    def _unpatchify(self, x: Tensor) -> Tensor:
        B, grid, p = x.shape[0], self.input_size // self.patch_size, self.patch_size
        x = x.reshape(B, grid, grid, p, p, self.out_channels)
        return torch.einsum("bhwpqc->bchpwq", x).reshape(B, self.out_channels, grid * p, grid * p)


def _sincos_2d(dim: int, grid: int) -> Tensor:
    """Fixed position embedding (grid * grid, dim); the first half of the channels is for the column."""
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # (G, dim / 4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (G, dim / 2)
    column, row = axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)
    return torch.cat([column, row], dim=1).float()
