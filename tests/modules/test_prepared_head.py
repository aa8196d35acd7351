"""A head whose side of the items is stored scores pairs as the head does."""

import pytest
import torch

from hllm_torchrec.modules.heads import PredictionHead
from hllm_torchrec.modules.prepared_head import PreparedHead, can_prepare


@pytest.mark.parametrize("evidence", [0, 4])
@pytest.mark.parametrize("hidden", [8, (12, 5)])
def test_pairs_are_scored_as_by_the_head(hidden: int | tuple[int, ...], evidence: int) -> None:
    torch.manual_seed(0)
    head = PredictionHead(6, hidden, dropout=0.5, fusion="late", evidence=evidence).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    users, items = torch.randn(3, 6) * 4, torch.randn(9, 6)
    user_of_pair, item_of_pair = torch.tensor([0, 0, 2, 1, 2]), torch.tensor([4, 4, 0, 8, 3])
    columns = torch.randn(5, evidence) if evidence else None
    prepared = PreparedHead(head)
    of_pairs = prepared.items(items)[item_of_pair]
    found = prepared.score(users, user_of_pair, of_pairs, columns)
    one = prepared.score(users[:1], None, of_pairs, columns)
    torch.testing.assert_close(one, prepared.score(users, 0 * user_of_pair, of_pairs, columns))
    expected = head(users[user_of_pair], items[item_of_pair], columns)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.std() > 0.1


def test_other_heads_are_not_prepared() -> None:
    assert not can_prepare(PredictionHead(6, 8, fusion="early"))
    assert not can_prepare(PredictionHead(6, (), fusion="late"))
