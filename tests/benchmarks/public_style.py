"""Network and step in the style of the public DiT and SiT code: what `bench_training_step.py` and `bench_gpu.py` take.

What they do is kept as it is: timm's patch embedding (the transposed view of a convolution) and its attention of
today (one reshape of qkv, then the fused kernel), modulation and gates as written in the papers' code, label dropout
inside the model, default AdamW, an average kept by a loop over two dicts of parameters, `.item()` in every step, and
Dispersive Loss through pdist. Only the unused variance channels are left out, so that both do the same work.
"""

import copy
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class Embedder(nn.Module):
    """Of times."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        args = t[:, None].float() * frequencies[None]
        return self.mlp(torch.cat([torch.cos(args), torch.sin(args)], dim=-1))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = layer_norm(width), layer_norm(width), Attention(width, heads)
        layers = {"fc1": nn.Linear(width, 4 * width), "act": nn.GELU("tanh"), "fc2": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final, self.linear = layer_norm(width), nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class LabelEmbedder(nn.Module):
    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes, self.embedding_table = classes, nn.Embedding(classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        if self.training:
            y = torch.where(torch.rand(len(y), device=y.device) < 0.1, self.classes, y)
        return self.embedding_table(y)


class PublicSiT(nn.Module):
    """SiT with the parameter names of the public code; as it stands SiT-S/4 for latents 4x32x32."""

    def __init__(
        self,
        patch: int = 4,
        depth: int = 12,
        width: int = 384,
        heads: int = 6,
        size: int = 32,
        channels: int = 4,
        classes: int = 1000,
        out: int = 4,
    ) -> None:
        super().__init__()
        self.patch, self.out = patch, out
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.t_embedder, self.y_embedder = Embedder(width), LabelEmbedder(classes, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2, width), requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.final_layer = FinalLayer(width, out * patch**2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)
        h = w = int(x.shape[1] ** 0.5)
        x = torch.einsum("nhwpqc->nchpwq", x.reshape(x.shape[0], h, w, self.patch, self.patch, self.out))
        return x.reshape(x.shape[0], self.out, h * self.patch, w * self.patch)


def dispersive(z: Tensor) -> Tensor:
    z = z.reshape(len(z), -1)
    d = F.pdist(z) ** 2 / z.shape[1]
    d = torch.cat([d, d, torch.zeros(len(z), device=z.device)])
    return torch.log(torch.exp(-d).mean())


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float = 0.9999) -> None:
    averages, parameters = OrderedDict(ema.named_parameters()), OrderedDict(model.named_parameters())
    for name, p in parameters.items():
        averages[name].mul_(decay).add_(p.data, alpha=1 - decay)


class PublicStyle:
    """One training step."""

    def __init__(self, model: nn.Module, tap: int, weight: float) -> None:
        self.model, self.weight = model.train(), weight
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
        self.ema, self.running = copy.deepcopy(model).requires_grad_(False), 0.0
        model.blocks[tap].register_forward_hook(lambda module, inputs, out: setattr(self, "tapped", out))

    def loss(self, x1: Tensor, y: Tensor) -> Tensor:
        t, x0 = torch.rand(len(x1), device=x1.device), torch.randn_like(x1)  # SiT's time runs from noise to data
        s = t.view(-1, 1, 1, 1)
        error = (self.model(s * x1 + (1 - s) * x0, t, y) - (x1 - x0)) ** 2
        loss = error.mean(dim=[1, 2, 3]).mean()
        return loss + self.weight * dispersive(self.tapped) if self.weight else loss

    def step(self, x1: Tensor, y: Tensor) -> None:
        loss = self.loss(x1, y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        update_ema(self.ema, self.model)
        self.running += loss.item()
