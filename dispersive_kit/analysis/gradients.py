"""Do the two losses pull against each other? Their gradients at every block, by part of t."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dispersive_kit.data import ImageSet
from dispersive_kit.diffusion.objectives import FlowMatching, Objective
from dispersive_kit.regularizers.losses import LossOptions, measure
from dispersive_kit.training.draws import DeviceSet


@dataclass(frozen=True)
class Pull:
    """Gradient of the weighted dispersive loss against that of the denoising loss, at the features.

    ratio: |g_disp| / |g_denoise|; cosine: between them, below 0 where they pull apart; each (bins of t, blocks), the
    first bin being the least noise. weights_cosine: between the gradients by each block's own weights (blocks,).
    """

    ratio: Tensor
    cosine: Tensor
    weights_cosine: Tensor


def gradient_pull(
    model: torch.nn.Module,
    data: ImageSet,
    *,
    weight: float = 0.5,
    options: LossOptions | None = None,
    objective: Objective | None = None,
    bins: int = 4,
    batches: int = 8,
    batch_size: int = 64,
    drop_prob: float = 0.1,
    seed: int = 0,
) -> Pull:
    """Compare both gradients on `batches` batches as training draws them: times mixed, some labels dropped.

    The loss of each block is that of a tap on this block alone. Rows are put into `bins` equal parts of t afterwards:
    a batch of one t would be another loss. options: of the dispersive loss, tau 0.5 by default.
    """
    options, objective = options or LossOptions("infonce_l2", 0.5), objective or FlowMatching()
    images, blocks = DeviceSet.of(data, "cpu"), list(model.blocks)  # type: ignore[arg-type]
    null = getattr(model, "null_label", None)
    features = torch.zeros(3, bins, len(blocks), dtype=torch.double)
    weights = torch.zeros(3, len(blocks), dtype=torch.double)
    for step in range(batches):
        batch = images.batch(objective, seed=seed, step=step, size=batch_size, null_label=null, drop_prob=drop_prob)
        loss, aux = objective(model, batch.x0, batch.y, draws=batch.draws, taps=range(len(blocks)))
        part = (aux.t * bins).long().clamp(max=bins - 1)
        for b, (z, block) in enumerate(zip(aux.taps, blocks, strict=True)):
            wanted = [z, *block.parameters()]
            spread = weight * measure(z, options).loss
            d, *d_weights = torch.autograd.grad(spread, wanted, retain_graph=True)
            g, *g_weights = torch.autograd.grad(loss, wanted, retain_graph=True)
            features[:, :, b] += products(d, g, part, bins)
            weights[:, b] += products(joined(d_weights), joined(g_weights), torch.zeros(1, dtype=torch.long), 1)[:, 0]
    (dd, gg, dg), (ww, vv, wv) = features, weights
    return Pull((dd / gg).sqrt(), dg / (dd * gg).sqrt(), wv / (ww * vv).sqrt())


def products(d: Tensor, g: Tensor, part: Tensor, bins: int) -> Tensor:
    """|d|^2, |g|^2 and <d, g> (3, bins) of gradients (B, ...), summed over the rows of each part."""
    d, g = d.flatten(1).double(), g.flatten(1).double()
    rows = torch.stack([d.square().sum(1), g.square().sum(1), (d * g).sum(1)])  # (3, B)
    return rows.new_zeros(3, bins).index_add_(1, part, rows)


def joined(tensors: list[Tensor]) -> Tensor:
    """All entries as one row (1, n)."""
    return torch.cat([tensor.flatten() for tensor in tensors])[None]
