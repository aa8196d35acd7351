"""Late-fusion head with what depends on the target alone computed once for all items.

Of the first layer's inputs [u, e, u * e] the part of e is linear in e: W_e e is stored for each item, W_u u is computed
once per user, and only W_p (u * e) for each pair, a third of the layer.

Legend: N items, M pairs, R users, D width, H width of the first hidden layer.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hllm_torchrec.modules.heads import PredictionHead


class PreparedHead:
    """Scores pairs of users and items as `PredictionHead` does in late fusion without evidence, up to rounding.

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
        """What is stored of the items [N, D + H]: normalized, and their part of the first layer."""
        normed: Tensor = self.head.item_norm(items_ND)
        return torch.cat([normed, F.linear(normed, self._of_item)], dim=1)

    @torch.no_grad()
    def score(self, users_RD: Tensor, user_of_pair: Tensor | None, items: Tensor) -> Tensor:
        """Logits [M] of pairs: the user (index [M] into users [R, D]; None: R is 1) and a row of `items`."""
        item_MD, hidden_MH = items.split([self._of_item.shape[1], self._of_item.shape[0]], dim=1)
        users = self.head.user_norm(users_RD)
        of_users = F.linear(users, self._of_user, self._bias)
        if user_of_pair is not None:
            users, of_users = (part.index_select(0, user_of_pair) for part in (users, of_users))
        product = users * item_MD
        hidden = torch.addmm(hidden_MH, product, self._of_product.t()) + of_users
        for layer in self._later:
            hidden = layer(hidden)
        logits: Tensor = self.head.out(hidden).squeeze(-1) + self.head.dot_scale * product.mean(dim=-1)
        return logits


def can_prepare(head: PredictionHead) -> bool:
    """True for a late-fusion head without evidence that has a hidden layer."""
    return head.fusion.query_is_user and head.wide is None and len(head.mlp) > 0
