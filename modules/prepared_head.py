"""Late-fusion head whose item-dependent part is computed once for all items.

The first layer of the head reads [u, e, u * e], so its output is W_u u + W_e e + W_p (u * e) + b. W_e e is stored for
each item, W_u u + b is computed once per user, and only W_p (u * e), a third of the layer, for each pair. A head with
evidence adds a projection of it to u, which is then computed for each pair, as W_u u is.

Legend: N items, M pairs, R users, D width, H width of the first hidden layer, F columns of evidence.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hllm_torchrec.modules.heads import PredictionHead


class PreparedHead:
    """Scores pairs of users and items as `PredictionHead` does in late fusion, up to rounding.

    Args:
        head: in evaluation mode, with a hidden layer (`can_prepare`).
    """

    def __init__(self, head: PredictionHead) -> None:
        assert can_prepare(head)
        self.head, self._later = head, list(head.mlp)[1:]
        first = head.mlp[0]
        assert isinstance(first, nn.Linear)
        self._of_user, of_item, self._of_product = first.weight.detach().split(head.user_norm.normalized_shape[0], 1)
        self._of_item, self._bias = of_item, first.bias

    @torch.no_grad()
    def items(self, items_ND: Tensor) -> Tensor:
        """Stored values of the items, [N, D + H]: normalized embeddings e, and W_e e."""
        normed: Tensor = self.head.item_norm(items_ND)
        return torch.cat([normed, F.linear(normed, self._of_item)], dim=1)

    @torch.no_grad()
    def score(
        self, users_RD: Tensor, user_of_pair: Tensor | None, items: Tensor, evidence: Tensor | None = None
    ) -> Tensor:
        """Logits [M] of user-item pairs.

        user_of_pair: [M] int64, index of each pair's user in `users_RD`; None: a single user, R = 1. items: [M, D + H],
        rows of `items()`. evidence: [M, F] of the pairs if the head was built with evidence, else None.
        """
        item_MD, hidden_MH = items.split([self._of_item.shape[1], self._of_item.shape[0]], dim=1)
        if self.head.read_evidence is not None:
            assert evidence is not None, "the head was built for evidence"
            of_pair = users_RD if user_of_pair is None else users_RD.index_select(0, user_of_pair)
            users_RD, user_of_pair = of_pair + self.head.read_evidence(evidence), None  # a row for each pair
        users = self.head.user_norm(users_RD)
        of_users = F.linear(users, self._of_user, self._bias)
        if user_of_pair is not None:
            users, of_users = (part.index_select(0, user_of_pair) for part in (users, of_users))
        product = users * item_MD
        hidden = torch.addmm(hidden_MH, product, self._of_product.t()) + of_users
        for layer in self._later:
            hidden = layer(hidden)
        logits: Tensor = self.head.out(hidden).squeeze(-1) + self.head.dot_scale * product.mean(dim=-1)
        return logits if self.head.wide is None else logits + self.head.wide(evidence).squeeze(-1)


def can_prepare(head: PredictionHead) -> bool:
    """True for a late-fusion head that has a hidden layer."""
    return head.fusion.query_is_user and len(head.mlp) > 0
