"""The mean text of what a user liked, against a loop."""

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hllm_torchrec.modules.features.liked_texts import LikedTexts

OFFSETS = torch.tensor([0, 4, 4, 9])
ACTIONS = [[1], [2], [], [1], [0], [2], [2], [1], [0]]
"""Of nine positions of three users; the fourth has none, which is action 0."""
SLOTS = 12
"""Positions, then slots of queries, which have no action."""


def features() -> KeyedJaggedTensor:
    bags = ACTIONS + [[]] * (SLOTS - len(ACTIONS))
    other = [[7, 7]] * SLOTS  # another feature, before it
    values = torch.tensor([x for bag in (*other, *bags) for x in bag])
    return KeyedJaggedTensor(["other", "action"], values, lengths=torch.tensor([len(x) for x in (*other, *bags)]))


def test_equals_a_loop_over_what_each_query_sees() -> None:
    texts = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    liked = LikedTexts(0.8, "action", 3)
    liked.measure(torch.tensor([0.0, 1.0, 9.0]), torch.tensor([0.0, 4.0, 10.0]))
    shares = [0.5, 0.25, 0.9]
    torch.testing.assert_close(liked.shares, torch.tensor(shares))
    rows = torch.tensor([0, 3, 8, 6])
    found = liked(texts, OFFSETS, features(), rows)
    for n, row in enumerate(rows.tolist()):
        first = 0 if row < 4 else 4
        weights = [0.8 ** (row - j) * shares[(ACTIONS[j] or [0])[0]] for j in range(first, row + 1)]
        mean = sum(w * texts[j] for w, j in zip(weights, range(first, row + 1), strict=True)) / sum(weights)
        torch.testing.assert_close(found[n], mean)


def test_without_actions_all_events_count_and_without_history_nothing_is_liked() -> None:
    texts, plain = torch.randn(9, 5), LikedTexts(1.0)
    torch.testing.assert_close(plain(texts, OFFSETS, features(), torch.tensor([3]))[0], texts[:4].mean(0))
    assert not plain(texts[:0], torch.tensor([0, 0]), features(), torch.tensor([0, 0])).any()
