"""Training ends after as many evaluations without a better score as its patience says."""

import pytest

from hllm_torchrec.training.early_stopping import EarlyStopping

SCORES = [0.5, 0.6, 0.6, 0.55, 0.7, 0.1, 0.1]


@pytest.mark.parametrize(("patience", "evaluations"), [(0, 7), (1, 3), (2, 4), (3, 7)])
def test_it_is_over_after_so_many_evaluations(patience: int, evaluations: int) -> None:
    stopping, done = EarlyStopping(patience), 0
    for score in SCORES:
        stopping.improves(score)
        done += 1
        if stopping.is_over:
            break
    assert done == evaluations


def test_an_equal_score_is_no_better() -> None:
    stopping = EarlyStopping(1)
    assert [stopping.improves(score) for score in SCORES[:3]] == [True, True, False]
    assert (stopping.best, stopping.stale) == (0.6, 1)
