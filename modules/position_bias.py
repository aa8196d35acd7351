"""Bias of where an item was shown (its position on a page), learned beside the logit and left out at serving.

    logit of a click = relevance(user, item, request) + sum_c B_c[value of c]        (training)
    logit of a click = relevance(user, item, request) + level                        (evaluation, serving)

The odds of a click are those of relevance times the odds of examination (Guo et al., PAL, RecSys 2019, there with a
network). Context of the bias tower therefore cannot explain what the items do, and the served order does not depend on
it. The level is the constant with which the mean probability is that of the pages that were shown: the mean of the bias
would give less for rare clicks, because probabilities are convex in the logit there.

Legend: X exposures, C context values, K binary tasks, O outputs of all tasks.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

MOMENTUM = 0.02
"""Share of a Newton step towards the level of a batch that is taken."""


class PositionBias(nn.Module):
    """Adds the bias to the outputs of binary tasks: that of the values in training, otherwise its level.

    Args:
        rows: {context: number of ids}, the unknown id 0 included.
        places: [K], the output of each binary task among the O outputs.
    """

    def __init__(self, rows: Mapping[str, int], places: Sequence[int]) -> None:
        super().__init__()
        # Named as TorchRec names tables, so that checkpoints load into larger ones (`checkpoint.growth`).
        tables = {f"bias_{name}": nn.Embedding(number, len(places)) for name, number in rows.items()}
        self.embedding_bags = nn.ModuleDict(tables)
        self.register_buffer("mean", torch.zeros(len(places)))
        self.mean: Tensor
        """[K], the level; named as in checkpoints."""
        self.places = list(places)
        self.sums: Tensor | None = None
        """[2, K] of the last forward pass in training, for `follow`."""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start without a bias."""
        for table in self.embedding_bags.values():
            nn.init.zeros_(table.weight)  # type: ignore[arg-type]

    def forward(self, outputs: Tensor, ids: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Outputs [X, O] with the bias.

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
        """[2, K] of Newton's step on the level c with sum of w sigmoid(z + c) = sum of w sigmoid(z + b): what is
        missing, and the slope."""
        served = torch.sigmoid(logits + self.mean)
        missing = (weights * (torch.sigmoid(logits + bias) - served)).sum(0)
        return torch.stack([missing, (weights * served * (1 - served)).sum(0)])

    @torch.no_grad()
    def follow(self, sums: Tensor) -> None:
        """Bring the level closer to that of a batch; sums: `sums`, added up over ranks, which then have one level."""
        missing, slope = sums
        # At most 1 of a logit: a step with few rows at the ends of the sigmoid would be arbitrarily long.
        self.mean += MOMENTUM * torch.where(slope > 0, missing / slope, 0).clamp(-1, 1)
