"""The similarity of texts: decayed sums equal a loop, and the joined vectors' cosine is the weighted sum of two."""

import pytest
import torch
from torch.nn import functional as F

from hllm_torchrec.modules.features.text_similarity import TextSimilarity, decayed_sums


@pytest.mark.parametrize("decay", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("lengths", [[5, 0, 1, 9, 2], [], [1], [16, 17]], ids=str)
def test_decayed_sums_equal_a_loop(lengths: list[int], decay: float) -> None:
    x = torch.randn(sum(lengths), 3, dtype=torch.float64)
    offsets = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    naive = torch.empty_like(x)
    for start, length in zip(offsets.tolist(), lengths, strict=False):
        total = torch.zeros(3, dtype=torch.float64)
        for row in range(start, start + length):
            total = decay * total + x[row]
            naive[row] = total
    torch.testing.assert_close(decayed_sums(x, offsets, decay), naive)


def test_a_later_text_changes_no_earlier_sum_and_no_other_user() -> None:
    similarity, x, offsets = TextSimilarity(0.5, 0.7), torch.randn(7, 4), torch.tensor([0, 4, 7])
    before = similarity.history(x, offsets)
    x[2] += 10
    after = similarity.history(x, offsets)
    assert torch.equal(before[:2], after[:2]) and torch.equal(before[4:], after[4:])
    assert not torch.allclose(before[2:4], after[2:4])


def test_the_cosine_of_joined_vectors_is_the_weighted_mean_of_both() -> None:
    similarity = TextSimilarity(0.5, 0.7)
    h, x, c, e = (torch.randn(6, width) for width in (3, 3, 8, 8))
    found = F.cosine_similarity(similarity.join(h, c), similarity.join(x, e))
    wanted = (F.cosine_similarity(h, x) + 0.5 * F.cosine_similarity(c, e)) / 1.5
    torch.testing.assert_close(found, wanted)
    assert similarity.join(h.bfloat16(), c.bfloat16()).dtype is torch.float32
