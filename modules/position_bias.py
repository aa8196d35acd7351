"""Bias of where an item was shown (its position on a page), learned beside the logit and left out at serving.

    logit of a click = relevance(user, item, request) + sum_c B_c[value of c]        (training)
    logit of a click = relevance(user, item, request) + level                        (evaluation, serving)

The odds of a click are those of relevance times the odds of examination (Guo et al., PAL, RecSys 2019, there with a
network). Context of the bias tower therefore cannot explain what the items do, and the served order does not depend on
it. The level is the constant with which the mean probability is that of the pages that were shown: the mean of the bias
would give less for rare clicks, because probabilities are convex in the logit there.

Legend: X exposures, C context values, K tasks.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

MOMENTUM = 0.02
"""Share of a Newton step towards the level of a batch that is taken."""


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
        """[K], the level; named as in checkpoints."""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start without a bias."""
        for table in self.embedding_bags.values():
            nn.init.zeros_(table.weight)  # type: ignore[arg-type]

    def forward(self, ids: Tensor, logits: Tensor, weights: Tensor) -> Tensor:
        """Return the bias [X, K] of ids [X, C], and bring the level closer to theirs. For training: see `mean`.

        logits: [X, K] without a bias; weights: [X, K], 0 where a task's label is not defined.
        """
        bias = torch.stack([table(ids[:, place]) for place, table in enumerate(self.embedding_bags.values())]).sum(0)
        self._follow(logits.detach() + bias.detach(), logits.detach(), weights)
        return bias

    @torch.no_grad()
    def _follow(self, biased: Tensor, logits: Tensor, weights: Tensor) -> None:
        """Newton's step on the level c: sum of w sigmoid(z + c) = sum of w sigmoid(z + b)."""
        served = torch.sigmoid(logits + self.mean)
        missing = (weights * (torch.sigmoid(biased) - served)).sum(0)
        slope = (weights * served * (1 - served)).sum(0)
        # At most 1 of a logit: a step with few rows at the ends of the sigmoid would be arbitrarily long.
        self.mean += MOMENTUM * torch.where(slope > 0, missing / slope, 0).clamp(-1, 1)
