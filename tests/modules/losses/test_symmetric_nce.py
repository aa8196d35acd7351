"""Symmetric InfoNCE against a loop, and what masking by cosine would do."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from hllm_torchrec.modules.losses.symmetric_nce import symmetric_nce

SCALE = torch.tensor([5.0])


def vectors(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.randn(rows, 6, generator=random), torch.randn(rows, 6, generator=random)


def by_loop(a: torch.Tensor, b: torch.Tensor, ids: list[int]) -> torch.Tensor:
    total = torch.zeros(())
    for x, y in ((a, b), (b, a)):
        for n, own in enumerate(ids):
            kept = [m for m, other in enumerate(ids) if m == n or other != own]
            logits = torch.stack([SCALE[0] * cosine_similarity(x[n], y[m], dim=0) for m in kept])
            total = total - logits.log_softmax(0)[kept.index(n)] / 2
    return total


def test_equals_a_loop_in_values_and_gradients_and_masks_rows_of_the_same_user() -> None:
    given, ids = vectors(5), [3, 4, 3, 9, 9]
    results = []
    for function in (
        lambda a, b: by_loop(a, b, ids),
        lambda a, b: symmetric_nce(a, b, torch.tensor(ids), SCALE).loss_sum,
    ):
        a, b = (x.clone().requires_grad_() for x in given)
        loss = function(a, b)
        loss.backward()
        results.append((loss.detach(), a.grad, b.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    output = symmetric_nce(*given, torch.tensor(ids), SCALE)
    assert output.count == 5 and float(output.effective_negatives) == pytest.approx((3 + 4 + 3 + 3 + 3) / 5)


def test_collapsed_embeddings_lose_log_n_and_by_cosine_nothing() -> None:
    """The published mask reports a loss of 0 with gradient 0 where everything has collapsed."""
    same = torch.ones(4, 6) + 1e-4 * vectors(4)[0]
    ids = torch.arange(4)
    found = symmetric_nce(same, same.flip(0), ids, SCALE)
    assert float(found.loss_sum) / 4 == pytest.approx(math.log(4), abs=1e-3)
    published = symmetric_nce(same, same.flip(0), ids, SCALE, cosine_above=0.99)
    assert float(published.loss_sum) == 0 and float(published.effective_negatives) == 0


def test_rows_of_other_ranks_are_candidates() -> None:
    a, b = vectors(6)
    ids = torch.tensor([0, 1, 2, 0, 4, 5])
    whole = symmetric_nce(a, b, ids, SCALE).loss_sum
    shares = [symmetric_nce(a[r], b[r], ids[r], SCALE, (a, b, ids)).loss_sum for r in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(sum(shares), whole)
    assert float(symmetric_nce(a[:0], b[:0], ids[:0], SCALE, (a, b, ids)).loss_sum) == 0
