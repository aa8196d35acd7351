"""Towers of several tasks over one shared representation of user and item: shared bottom, or MMoE.

    f = LN(query) (early fusion), or [u, e, u * e] (late fusion), as in `PredictionHead`
    shared bottom:  s_k = MLP(f) for every task k
    MMoE:           s_k = sum_e softmax(G_k f)_e * MLP_e(f)           (Ma et al., KDD 2018)
    outputs of task k:  W_k SiLU(V_k s_k + c_k) + b_k + scale_k * mean(u * e)

All tasks share one pass of the user encoder and one matrix product per layer. mean(u * e) is in late fusion only.

Legend: X exposures, D width, H hidden width, F columns of evidence, E experts, K tasks, O outputs of all tasks.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hllm_torchrec.modules.fusion import Fusion
from hllm_torchrec.modules.precision import widen


class TaskTowers(nn.Module):
    """Outputs [X, O] of several tasks.

    Args:
        width: D.
        hidden: H, width of the bottom or of an expert.
        outputs: number of outputs of each task.
        dropout: probability after each hidden layer's SiLU.
        fusion: "early" or "late".
        evidence: F, number of evidence columns per exposure (0: none). A projection of them is added to the query, and
            a linear layer that starts at 0 adds them to each output.
        experts: E; 0: shared bottom.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        outputs: Sequence[int],
        dropout: float = 0.0,
        fusion: str = Fusion.LATE,
        evidence: int = 0,
        experts: int = 0,
    ) -> None:
        super().__init__()
        self.fusion, self.experts, self.dropout = Fusion(fusion), experts, nn.Dropout(dropout)
        self.outputs = tuple(outputs)
        tasks, total, tower = len(self.outputs), sum(self.outputs), max(8, hidden // 4)
        features = width if self.fusion.query_is_target else 3 * width
        self.user_norm = nn.LayerNorm(width)
        if self.fusion.query_is_user:
            self.item_norm = nn.LayerNorm(width)
            self.dot_scale = nn.Parameter(torch.empty(total))
        self.bottom = nn.Linear(features, hidden * max(experts, 1))
        self.gates = nn.Linear(features, tasks * experts, bias=False) if experts else None
        self.tower_weight = nn.Parameter(torch.empty(tasks, tower, hidden))
        self.tower_bias = nn.Parameter(torch.empty(tasks, tower))
        self.out_weight = nn.Parameter(torch.empty(total, tower))
        self.out_bias = nn.Parameter(torch.empty(total))
        self.wide = nn.Linear(evidence, total) if evidence else None
        self.read_evidence = nn.Linear(evidence, width, bias=False) if evidence else None
        owner = torch.repeat_interleave(torch.arange(tasks), torch.tensor(self.outputs))
        self.register_buffer("task_of_output", owner, persistent=False)
        self.task_of_output: Tensor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the parameters of this module; its submodules have `reset_parameters` of their own."""
        for weight, fan_in in ((self.tower_weight, self.tower_weight.shape[2]), (self.out_weight, None)):
            bound = 1 / math.sqrt(fan_in or self.out_weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)
        nn.init.zeros_(self.tower_bias)
        nn.init.zeros_(self.out_bias)
        if self.fusion.query_is_user:
            # The dot product orders items. It cannot separate the classes of one task, so tasks with several outputs
            # start without it.
            single = [float(number == 1) for number in self.outputs for _ in range(number)]
            with torch.no_grad():
                self.dot_scale.copy_(torch.tensor(single))
        if self.wide is not None:
            nn.init.zeros_(self.wide.weight)
            nn.init.zeros_(self.wide.bias)

    def forward(self, query: Tensor, item: Tensor | None = None, evidence: Tensor | None = None) -> Tensor:
        """Return outputs [X, O], at least float32; the arguments are those of `PredictionHead`."""
        assert (item is not None) == self.fusion.query_is_user, "early fusion has no item, late fusion has one"
        if self.read_evidence is not None:
            assert evidence is not None, "the towers were built for evidence"
            query = query + self.read_evidence(evidence)
        user, dot = self.user_norm(query), None
        features = user
        if item is not None:
            target = self.item_norm(item)
            product = user * target
            with torch.autocast(device_type=query.device.type, enabled=False):
                dot = widen(product).mean(dim=-1, keepdim=True) * self.dot_scale
            features = torch.cat((user, target, product), dim=-1)
        outputs = self._towers(self._shared(features))
        if dot is not None:
            outputs = outputs + dot
        if self.wide is None:
            return outputs
        assert evidence is not None
        with torch.autocast(device_type=query.device.type, enabled=False):
            return outputs + self.wide(widen(evidence))

    def _shared(self, features: Tensor) -> Tensor:
        """Representation of each task: [X, K, H], or [X, 1, H] with a shared bottom."""
        hidden = self.dropout(F.silu(self.bottom(features)))
        if self.gates is None:
            return hidden[:, None]
        gates = torch.softmax(self.gates(features).unflatten(-1, (-1, self.experts)), dim=-1)
        return torch.einsum("xke,xeh->xkh", gates, hidden.unflatten(-1, (self.experts, -1)))

    def _towers(self, shared: Tensor) -> Tensor:
        """Outputs [X, O] of the towers; the last layer in at least float32, as in `PredictionHead`."""
        if shared.shape[1] == 1:  # one product for all tasks
            flat = F.linear(shared[:, 0], self.tower_weight.flatten(0, 1), self.tower_bias.flatten())
            first = flat.unflatten(-1, self.tower_bias.shape)
        else:
            first = torch.einsum("xkh,kth->xkt", shared, self.tower_weight) + self.tower_bias
        hidden = self.dropout(F.silu(first))
        if len(self.outputs) < sum(self.outputs):  # all outputs of a task read the task's tower
            hidden = hidden[:, self.task_of_output]
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            return (widen(hidden) * widen(self.out_weight)).sum(dim=-1) + widen(self.out_bias)

    @torch.no_grad()
    def initialize_bias(self, start: Sequence[float]) -> None:
        """Set the biases of the outputs to `start` [O], those of a constant prediction."""
        self.out_bias.copy_(torch.tensor(start))

    @torch.no_grad()
    def initialize_evidence(self, weights: Tensor, bias: float) -> None:
        """Make the first output equal to a logistic regression on evidence alone, with weights [F] and bias; the towers
        then add exactly 0 to it."""
        assert self.wide is not None
        self.wide.weight[0].copy_(weights)
        self.wide.bias[0] = bias
        self.out_weight[0].zero_()
        self.out_bias[0] = 0.0
        if self.fusion.query_is_user:
            self.dot_scale[0] = 0.0
