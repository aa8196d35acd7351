import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hllm_torchrec.metrics.approximate_auc import BoundedAuc, ScoreHistogram
from hllm_torchrec.metrics.auc import roc_auc
from tests.helpers.distributed import run_ranks

SCORES = st.one_of(
    st.floats(width=32, allow_nan=False),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, math.inf, -math.inf, 1.0, 1.0001]),
)
ROWS = st.lists(st.tuples(st.booleans(), SCORES), min_size=1, max_size=60)


def histogram(labels: torch.Tensor, scores: torch.Tensor, bits: int = 16) -> ScoreHistogram:
    result = ScoreHistogram(bits)
    result.add(labels, scores)
    return result


def draw(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(rows, generator=generator) < 0.2).float()
    return labels, torch.randn(rows, generator=generator) + labels


@given(ROWS, st.integers(10, 20))
@settings(max_examples=60, deadline=None)
def test_the_exact_auc_is_within_the_bound(rows: list[tuple[bool, float]], bits: int) -> None:
    labels = torch.tensor([label for label, _ in rows])
    scores = torch.tensor([score for _, score in rows], dtype=torch.float32)
    found, exact = histogram(labels, scores, bits).auc(), roc_auc(labels, scores)
    assert math.isnan(exact) == math.isnan(found.auc)
    if not math.isnan(exact):
        assert abs(found.auc - exact) <= found.error + 1e-12


@pytest.mark.parametrize(("bits", "bound"), [(12, 2e-2), (16, 2e-3), (20, 1e-4)])
def test_the_bound_is_small_for_logits(bits: int, bound: float) -> None:
    labels, scores = draw(20_000)
    found = histogram(labels, scores, bits).auc()
    assert 0 < found.error < bound
    assert abs(found.auc - roc_auc(labels, scores)) <= found.error


def test_ties_are_exact() -> None:
    labels, scores = draw(5_000)
    rounded = (scores * 4).round() / 4
    assert histogram(labels, rounded).auc() == BoundedAuc(pytest.approx(roc_auc(labels, rounded), abs=1e-12), 0.0)
    assert histogram(labels, torch.full((5_000,), 0.3)).auc() == BoundedAuc(0.5, 0.0)


def test_batches_add_up_to_all_rows() -> None:
    labels, scores = draw(3_000)
    whole, parts = histogram(labels, scores), ScoreHistogram()
    for part in (slice(0, 10), slice(10, 10), slice(10, 3_000)):
        parts.add(labels[part], scores[part])
    assert parts.auc() == whole.auc()


def test_one_class_has_no_auc() -> None:
    found = histogram(torch.ones(4), torch.arange(4.0)).auc()
    assert math.isnan(found.auc) and math.isnan(found.error)


def test_bad_rows_and_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="labels 0 or 1 and scores that are numbers"):
        histogram(torch.tensor([0.0, 1.0]), torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="labels 0 or 1"):
        histogram(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]))
    with pytest.raises(ValueError, match="bits is 30; a histogram has 10 to 24"):
        ScoreHistogram(30)


def own_share(ranks: int) -> BoundedAuc:
    """Runs on each rank."""
    rank = torch.distributed.get_rank()
    labels, scores = draw(4_000)
    found = histogram(labels[rank::ranks], scores[rank::ranks])
    found.all_reduce()
    return found.auc()


@pytest.mark.slow
def test_ranks_give_the_same_bits_as_one() -> None:
    assert run_ranks(own_share, 2, 2) == [histogram(*draw(4_000)).auc()] * 2
