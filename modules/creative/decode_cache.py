"""Attention plans of decoding: keys and values of the positions before {user}, per item, and of later ones, per user.

The positions of an item's prompt before {user} are the same for all users of the item. Unless the items have very
different numbers of users (MOST_PADDING), their keys and values are not copied: a step reads them once per item, for
all users of the item together.

Legend: I items, B users, L positions before {user}, n new positions of each user, m of at most M positions of each user
after the prefix, H heads, G key-value heads, r = H / G, E width of a head, w any width, u maximum number of users of an
item.
"""

import torch
from torch import Tensor

from hllm_torchrec.modules.attention.text import grouped_attention

MOST_PADDING = 2
"""Maximum number of cells per user: the users of each item are padded to u cells; if there would be more than
MOST_PADDING cells per user on average, each user gets a copy of the prefix instead."""


class PrefixPlan:
    """`TextPlan` of the pass over the positions before {user} of I items.

    layers: the keys and values of each layer, [I, G, L, E].
    """

    def __init__(self, items: int, length: int, device: torch.device) -> None:
        self.items, self.longest = items, length
        self.position_ids = torch.arange(length, device=device).repeat(items)[None]
        self.layers: list[tuple[Tensor, Tensor]] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`; called once per layer, in layer order."""
        q, k, v = (x.unflatten(0, (self.items, -1)) for x in (query, key, value))
        self.layers.append((k.transpose(1, 2), v.transpose(1, 2)))
        return grouped_attention(q, k, v, None, True, scaling, dropout)


class UserPlan:
    """`TextPlan` of the passes over the positions of B users after the prefixes of their items; `advance` begins a
    pass.

    Args:
        prefixes: `layers` of a `PrefixPlan`; empty if the prompts begin with {user}.
        item_of: int64 [B] item of each user.
        most: M.
        lengths: int64 [B] number of positions of each user in the first pass, which is padded on the right; None: no
            padding.
    """

    def __init__(
        self, prefixes: list[tuple[Tensor, Tensor]], item_of: Tensor, most: int, lengths: Tensor | None = None
    ) -> None:
        self.number, self.most, self.item_of, self.lengths = item_of.numel(), most, item_of, lengths
        self.before = prefixes[0][0].shape[2] if prefixes else 0
        self.prefixes = prefixes
        self._group()
        self.own: list[tuple[Tensor, Tensor]] = []
        self.first = self.end = self._layer = self._padded = 0

    def _group(self) -> None:
        """Assign users to cells: cells [I u] is the user of each cell (user 0 for padding), cell_of [B] the cell."""
        if not self.before:
            return
        of, items = self.item_of, self.prefixes[0][0].shape[0]
        counts = torch.bincount(of, minlength=items)
        if items * int(counts.max()) > MOST_PADDING * self.number:
            self.prefixes = [(k[of], v[of]) for k, v in self.prefixes]
            self.item_of = of = torch.arange(self.number, device=of.device)
            counts, items = torch.ones_like(of), self.number
        order = of.argsort(stable=True)
        place = torch.arange(self.number, device=of.device) - (counts.cumsum(0) - counts)[of[order]]
        self.cell_of = torch.empty_like(of)
        self.cell_of[order] = of[order] * int(counts.max()) + place
        self.cells = torch.zeros(items * int(counts.max()), dtype=torch.int64, device=of.device)
        self.cells[self.cell_of] = torch.arange(self.number, device=of.device)
        self.items = items

    def advance(self, new: int) -> None:
        """Begin a pass over n = `new` more positions of each user."""
        self.first, self.end, self._layer = self.end, self.end + new, 0
        assert self.end <= self.most, "more positions than were announced"
        self._place = torch.arange(self.first, self.end, device=self.item_of.device).expand(self.number, -1)
        if not self.first:
            self._padded = new
        elif self.lengths is not None:  # overwrite the padding of the first pass, which no position attends to
            self._place = self._place - self._padded + self.lengths[:, None]
        self.position_ids = (self.before + self._place).flatten()[None]
        self.longest = self.before + self.end

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`; called once per layer, in layer order."""
        q, k, v = (x.unflatten(0, (self.number, -1)) for x in (query, key, value))
        keys, values = self._with_own(k.transpose(1, 2), v.transpose(1, 2))
        layer, self._layer = self._layer, self._layer + 1
        if q.shape[1] == 1:
            return self._attend_next(q[:, 0], keys, values, layer, scaling)
        assert not self.first, "only the first pass may have several positions"
        mask = None  # padding comes after all real positions, so the causal mask hides it
        if self.before:
            old = (x.index_select(0, self.item_of).transpose(1, 2) for x in self.prefixes[layer])
            k, v = (torch.cat([x, new], 1) for x, new in zip(old, (k, v), strict=True))
            mask = torch.ones(self.end, k.shape[1], dtype=torch.bool, device=k.device).tril(self.before)
        return grouped_attention(q, k, v, mask, not self.before, scaling, dropout)

    def _with_own(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, G, n, E] of the layer; returns those of all positions so far, [B, G, m, E]."""
        if self._layer == len(self.own):
            shape = *k.shape[:2], self.most
            # Zeros: the later positions of a user with fewer positions are masked, but 0 times the NaN of uninitialized
            # memory is NaN.
            self.own.append((k.new_zeros(*shape, k.shape[3]), v.new_zeros(*shape, v.shape[3])))
        for kept, new in zip(self.own[self._layer], (k, v), strict=True):
            if self.lengths is None or not self.first:
                kept[:, :, self.first : self.end] = new
            else:
                kept.scatter_(2, self._place[:, None, :, None].expand_as(new), new)
        keys, values = self.own[self._layer]
        return keys[:, :, : self.end], values[:, :, : self.end]

    def _attend_next(self, q: Tensor, keys: Tensor, values: Tensor, layer: int, scaling: float) -> Tensor:
        """Attend with the next position of each user to all earlier positions and itself: q [B, H, E] -> [B, H, E]."""
        q = q.unflatten(1, (keys.shape[1], -1))
        scores = [q @ keys.transpose(2, 3)]
        if self.lengths is not None:
            later = torch.arange(self.end, device=q.device) > self._place
            scores[0] = scores[0].masked_fill(later[:, None, None], float("-inf"))
        if self.before:
            scores.append(self._of_users(self._of_items(q) @ self.prefixes[layer][0].transpose(2, 3), q.shape[2]))
        weights = (torch.cat(scores, 3) * scaling).softmax(3, dtype=torch.float32).to(values.dtype)
        out = weights[..., : self.end] @ values
        if self.before:
            weights = self._of_items(weights[..., self.end :])
            out = out + self._of_users(weights @ self.prefixes[layer][1], q.shape[2])
        return out.flatten(1, 2)

    def _of_items(self, x: Tensor) -> Tensor:
        """Group rows by item: [B, G, r, w] -> [I, G, u r, w]."""
        return x.index_select(0, self.cells).unflatten(0, (self.items, -1)).transpose(1, 2).flatten(2, 3)

    def _of_users(self, x: Tensor, repeats: int) -> Tensor:
        """Reverse `_of_items`: [I, G, u r, w] -> [B, G, r, w]."""
        return x.unflatten(2, (-1, repeats)).transpose(1, 2).flatten(0, 1).index_select(0, self.cell_of)
