"""The Item-User Predictor: scores of single pairs, and of all pairs in blocks."""

import pytest
import torch

from hllm_torchrec.modules.creative.match_head import MatchHead


@pytest.mark.parametrize("kind", ["mixer", "mlp"])
def test_scores_of_all_pairs_are_those_of_each_pair_alone(kind: str) -> None:
    torch.manual_seed(0)
    head, users, items = MatchHead(6, 5, 8, kind), torch.randn(3, 6), torch.randn(7, 5)
    every = head.score_all(users, items, block=4)
    assert every.shape == (3, 7)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(7))
    together = head(users, items, pairs)
    torch.testing.assert_close(together.view(3, 7), every)
    for n, (user, item) in enumerate(pairs.tolist()):
        alone = head(users[user : user + 1], items[item : item + 1], torch.zeros(1, 2, dtype=torch.int64))
        torch.testing.assert_close(alone[0], together[n])
    assert together.std() > 1e-3
    assert head.score_all(users, items[:0]).shape == (3, 0) and head(users, items, pairs[:0]).shape == (0,)
