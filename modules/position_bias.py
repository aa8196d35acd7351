"""Bias of where an item was shown (its position on a page), learned beside the logit and left out at serving.

    logit of a click = relevance(user, item, request) + sum_c B_c[value of c]        (training)
    logit of a click = relevance(user, item, request) + mean of the sum              (evaluation, serving)

The odds of a click are those of relevance times the odds of examination (Guo et al., PAL, RecSys 2019, there with a
network). Context of the bias tower therefore cannot explain what the items do, and the served order does not depend on
it; the mean over training keeps probabilities at the level of the pages that were shown.

Legend: X exposures, C context values, K tasks.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

MOMENTUM = 0.02
"""Weight of a step in the running mean."""


class PositionBias(nn.Module):
    """Additive bias [X, K].

    Args:
        rows: {context: number of ids}, the unknown id 0 included.
        tasks: K.
    """

    def __init__(self, rows: Mapping[str, int], tasks: int) -> None:
        super().__init__()
        # Named as TorchRec names tables, so that checkpoints load into larger ones (`checkpoint.growth`).
        tables = {f"bias_{name}": nn.Embedding(number, tasks) for name, number in rows.items()}
        self.embedding_bags = nn.ModuleDict(tables)
        self.register_buffer("mean", torch.zeros(tasks))
        self.mean: Tensor
        """[K], the bias outside of training."""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start without a bias."""
        for table in self.embedding_bags.values():
            nn.init.zeros_(table.weight)  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Tensor:
        """Return the bias [X, K] of ids [X, C], and update its running mean. For training: see `mean`."""
        bias = torch.stack([table(ids[:, place]) for place, table in enumerate(self.embedding_bags.values())]).sum(0)
        if len(bias):
            self.mean.lerp_(bias.detach().mean(0), MOMENTUM)
        return bias
