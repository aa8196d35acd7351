"""MMoE in the place of a DLRM's top network: experts that all tasks share, and a gate and a tower for each task.

    s_k = sum_e softmax(G_k x)_e * MLP_e(x)                  (Ma et al., KDD 2018)
    outputs of task k:  W_k ReLU(V_k s_k + c_k) + b_k

Legend: B rows, I width of the interactions x, H width of an expert's last layer, E experts, O outputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.mlp import MLP


class ExpertOverArch(nn.Module):
    """Outputs [B, O] of several tasks.

    Args:
        width: I.
        hidden: widths of the layers of an expert; the last one is H.
        outputs: number of outputs of each task.
        experts: E.
    """

    def __init__(self, width: int, hidden: Sequence[int], outputs: Sequence[int], experts: int) -> None:
        super().__init__()
        tower = max(8, hidden[-1] // 4)
        self.experts = nn.ModuleList(MLP(width, list(hidden)) for _ in range(experts))
        self.gates = nn.Linear(width, len(outputs) * experts, bias=False)
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden[-1], tower), nn.ReLU(), nn.Linear(tower, number)) for number in outputs
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map interactions [B, I] to outputs [B, O]."""
        found = torch.stack([expert(features) for expert in self.experts], dim=1)
        gates = torch.softmax(self.gates(features).unflatten(-1, (len(self.towers), -1)), dim=-1)
        shared = torch.einsum("bke,beh->kbh", gates, found)
        return torch.cat([tower(own) for tower, own in zip(self.towers, shared, strict=True)], dim=1)

    @torch.no_grad()
    def initialize_bias(self, start: Sequence[float]) -> None:
        """Set the last biases to `start` [O], those of a constant prediction."""
        ends = [list(tower.children())[-1] for tower in self.towers]
        last = [layer for layer in ends if isinstance(layer, nn.Linear)]
        for layer, values in zip(last, torch.tensor(start).split([layer.out_features for layer in last]), strict=True):
            layer.bias.copy_(values)
