"""Position bias: a learned term of the logit for where an item was shown (its position on a page), unused at serving.

    logit of a click = relevance(user, item, request) + sum_c B_c[value of c]        (training)
    logit of a click = relevance(user, item, request) + level                        (evaluation, serving)

The odds of a click are the odds of relevance times the odds of examination (Guo et al., PAL, RecSys 2019, who use a
network). The bias of a value is the same for all items, so it does not order them, and the served order does not depend
on it. The level is the constant for which the mean probability equals that with the biases of the pages that were
shown. The mean of the bias would give a lower probability for rare clicks, because the sigmoid is convex at small
logits.

Legend: X exposures, C context values, K binary tasks, O outputs of all tasks.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

MOMENTUM = 0.02
"""Fraction of the Newton step towards a batch's level by which the level moves."""


class PositionBias(nn.Module):
    """Adds a bias to the outputs of binary tasks: in training the bias of the context values, otherwise the level.

    Args:
        rows: {context: number of ids}, including the unknown id 0.
        places: [K], index of each binary task's output among the O outputs.
    """

    def __init__(self, rows: Mapping[str, int], places: Sequence[int]) -> None:
        super().__init__()
        # Named as TorchRec names tables, so that checkpoints load into larger ones (`checkpoint.growth`).
        tables = {f"bias_{name}": nn.Embedding(number, len(places)) for name, number in rows.items()}
        self.embedding_bags = nn.ModuleDict(tables)
        self.register_buffer("mean", torch.zeros(len(places)))
        self.mean: Tensor
        """[K], the level (not a mean); checkpoints have it under this name."""
        self.places = list(places)
        self.sums: Tensor | None = None
        """[2, K], sums of the last forward pass in training (`_newton`), for `follow`."""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start without a bias."""
        for table in self.embedding_bags.values():
            nn.init.zeros_(table.weight)  # type: ignore[arg-type]

    def forward(self, outputs: Tensor, ids: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Return outputs [X, O] with the bias added.

        ids: [X, C], in training; weights: [X, K], 0 where a task's label is not defined. `follow` must be called after
        each pass in training.
        """
        places = torch.tensor(self.places, device=outputs.device)
        bias = self.mean
        if self.training:
            assert ids is not None and weights is not None, "the batch has no context for the position bias"
            bias = self.of(ids)
            self.sums = self._newton(outputs[:, places].detach(), bias.detach(), weights)
        wide = outputs.new_zeros(outputs.shape).index_copy(1, places, bias.expand(len(outputs), -1).to(outputs))
        return outputs + wide

    def of(self, ids: Tensor) -> Tensor:
        """The bias [X, K] of ids [X, C]."""
        return torch.stack([table(ids[:, place]) for place, table in enumerate(self.embedding_bags.values())]).sum(0)

    @torch.no_grad()
    def _newton(self, logits: Tensor, bias: Tensor, weights: Tensor) -> Tensor:
        """Sums [2, K] for a Newton step on the level c in sum w sigmoid(z + c) = sum w sigmoid(z + b): right minus left
        side at the current level, and the derivative of the left side."""
        served = torch.sigmoid(logits + self.mean)
        missing = (weights * (torch.sigmoid(logits + bias) - served)).sum(0)
        return torch.stack([missing, (weights * served * (1 - served)).sum(0)])

    @torch.no_grad()
    def follow(self, sums: Tensor) -> None:
        """Move the level towards that of a batch. sums: `self.sums` summed over all ranks, so that their levels are
        equal."""
        missing, slope = sums
        # Newton steps are clamped to 1: with few rows, all at the flat ends of the sigmoid, they could be huge.
        self.mean += MOMENTUM * torch.where(slope > 0, missing / slope, 0).clamp(-1, 1)
