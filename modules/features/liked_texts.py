"""Mean text embedding of a user's likes: a mean over the history's items, weighted by action and recency.

    c_t = sum over j <= t of gamma^(t - j) a(action_j) e_j / sum over j <= t of gamma^(t - j) a(action_j)

gamma is the decay, e_j the text embedding of item j. a(action) is the share of positive labels among the labeled events
with this action, of a sample of users. The vectors of a user encoder that is trained to rank separate likes from
dislikes, but contain little information about the topics of the likes: on MovieLens a linear model that predicts the
genre which a user favors has a cross-entropy of .82 nats with these vectors, and of .42 nats with c
(docs/experiments.md).

Legend: T history positions, Q queries, E width of a text embedding, A actions.
"""

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hllm_torchrec.modules.features.text_similarity import decayed_sums
from hllm_torchrec.modules.precision import widen


class LikedTexts(nn.Module):
    """Computes the means c; see the module docstring.

    Args:
        decay: gamma in (0, 1] per event.
        key, actions: feature of a batch with the action of each history position, and A; None and 1 without actions.

    Buffers (in checkpoints): shares [A] float32, a; measured, bool: whether `measure` was called.
    """

    shares: Tensor
    measured: Tensor

    def __init__(self, decay: float, key: str | None = None, actions: int = 1) -> None:
        super().__init__()
        self.decay, self.key = decay, key
        self.register_buffer("shares", torch.ones(actions))
        self.register_buffer("measured", torch.tensor(False))

    @torch.no_grad()
    def measure(self, positive: Tensor, events: Tensor) -> None:
        """Set the shares from the numbers of positive labels and of labeled events by action, [A] each; 1/2 if none."""
        self.shares.copy_(torch.where(events > 0, positive / events.clamp(min=1), 0.5))
        self.measured.fill_(True)

    def forward(self, texts_TE: Tensor, seq_offsets: Tensor, features: KeyedJaggedTensor, rows: Tensor) -> Tensor:
        """Compute the means [Q, E] at the history positions `rows` [Q]; zeros if T = 0."""
        if not len(texts_TE):
            return texts_TE.new_zeros(len(rows), texts_TE.shape[1])
        weights = self._weights(features, len(texts_TE))[:, None].to(widen(texts_TE).dtype)
        sums = decayed_sums(torch.cat([widen(texts_TE) * weights, weights], 1), seq_offsets, self.decay)[rows]
        return sums[:, :-1] / sums[:, -1:].clamp(min=1e-6)

    def _weights(self, features: KeyedJaggedTensor, positions: int) -> Tensor:
        """Return a(action) [T] of the history positions, which are the first slots; positions without an action have
        action 0."""
        if self.key is None:
            return self.shares.expand(positions)
        bags = features[self.key]
        starts, lengths = bags.offsets()[:positions].long(), bags.lengths()[:positions]
        values = torch.cat([bags.values().long(), starts.new_zeros(1)])
        return self.shares[torch.where(lengths > 0, values[starts.clamp(max=len(values) - 1)], 0)]
