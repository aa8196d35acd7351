"""`MatchHead`: the Item-User Predictor of HLLM-Creator; it predicts whether a user likes an item.

Legend: n users, m items, p pairs, T tokens, D and E widths of user and item vectors, W width of a token.
"""

import torch
from torch import Tensor, nn

from hllm_torchrec.modules.precision import widen


class MixerBlock(nn.Module):
    """MLP-Mixer block over a few tokens [p, T, W]: an MLP across tokens, then one across channels, both residual."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.token_norm, self.channel_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.token_mlp = nn.Sequential(nn.Linear(tokens, width), nn.GELU(), nn.Linear(width, tokens))
        self.channel_mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens [p, T, W]; returns the same shape."""
        x = x + self.token_mlp(self.token_norm(x).transpose(1, 2)).transpose(1, 2)
        mixed: Tensor = x + self.channel_mlp(self.channel_norm(x))
        return mixed


class MatchHead(nn.Module):
    """Logits of (user, item) pairs: linear towers of width W, then an MLP-Mixer over the two tokens, or an MLP.

    Args:
        user_width, item_width, width: D, E, W.
        kind: "mixer" or "mlp".
        blocks: number of mixer blocks, or of hidden layers.
    """

    def __init__(self, user_width: int, item_width: int, width: int, kind: str = "mixer", blocks: int = 2) -> None:
        super().__init__()
        self.user_tower, self.item_tower = nn.Linear(user_width, width), nn.Linear(item_width, width)
        if kind == "mixer":
            self.mix: nn.Module = nn.Sequential(*(MixerBlock(2, width) for _ in range(blocks)), nn.Flatten(1))
        else:
            layers: list[nn.Module] = [nn.Flatten(1)]
            for _ in range(blocks):
                layers += [nn.Linear(2 * width, 2 * width), nn.GELU()]
            self.mix = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(2 * width)
        self.out = nn.Linear(2 * width, 1)

    def forward(self, users: Tensor, items: Tensor, pairs: Tensor) -> Tensor:
        """Return the logits [p], at least float32, of pairs [p, 2] (int64 rows of users [n, D] and items [m, E])."""
        # The towers run once per user and item, not once per pair.
        u, i = self.user_tower(users), self.item_tower(items)
        return self._of_towers(u[pairs[:, 0]], i[pairs[:, 1]])

    def _of_towers(self, u: Tensor, i: Tensor) -> Tensor:
        mixed = self.norm(self.mix(torch.stack([u, i], 1)))
        # float32 also under autocast, as in `PredictionHead`: many bfloat16 logits would be equal.
        with torch.autocast(mixed.device.type, enabled=False):
            logits: Tensor = self.out(widen(mixed))[:, 0]
        return logits

    @torch.no_grad()
    def score_all(self, users: Tensor, items: Tensor, block: int = 65_536) -> Tensor:
        """Return the logits [n, m] of all pairs, computed for about `block` pairs at a time."""
        u, i = self.user_tower(users), self.item_tower(items)
        step = max(1, block // max(1, u.shape[0]))
        parts = []
        for some in i.split(step):
            left = u[:, None].expand(-1, some.shape[0], -1).flatten(0, 1)
            right = some[None].expand(u.shape[0], -1, -1).flatten(0, 1)
            parts.append(self._of_towers(left, right).view(u.shape[0], -1))
        return torch.cat([widen(u.new_empty(u.shape[0], 0)), *parts], 1)
