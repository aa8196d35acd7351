"""Transitions: the closed form equals a regression solved row by row, and what leaves the fit is as an unknown item."""

from pathlib import Path

import numpy as np
import pytest

from hllm_torchrec.data import transitions
from hllm_torchrec.data.transitions import FILE, TransitionOptions, Transitions, fit_transitions
from tests.helpers import fixtures


def direct(options: TransitionOptions, texts: np.ndarray | None) -> np.ndarray:
    """B [N, N] of rows that are built one by one, scaled to a mean score of 1 for what came next."""
    dataset = fixtures.dataset("leave_one_out")
    number, rows, wanted = dataset.num_items, [], []
    for group in dataset.row_groups(options.part):
        for events in dataset.sequences([group], ["item_ids", "labels"]).pieces():
            keep = events.labels == 1 if options.positive_history else np.ones(len(events.labels), bool)
            items, labels, x = events.item_ids[keep], events.labels[keep], np.zeros(number)
            for t in range(len(items) - 1):
                x = options.decay * x
                x[items[t]] += 1
                if not (options.positive_targets and labels[t + 1] == 0):
                    rows.append(x)
                    wanted.append(items[t + 1])
    x, y = np.array(rows), np.eye(number)[wanted]
    used = np.zeros(number, bool)
    used[np.concatenate([events.item_ids for events in _all(dataset, options.part)])] = True
    x, y = x[:, used], y[:, used]
    inverse = np.eye(used.sum())
    if texts is not None:
        unit = texts[used] / np.linalg.norm(texts[used], axis=1, keepdims=True)
        inverse = np.linalg.inv(inverse + unit @ unit.T) + 0.01 * inverse
    penalty = transitions.RIDGE * np.trace(x.T @ x) / used.sum()
    solved = np.linalg.solve(x.T @ x + penalty * inverse, x.T @ y)
    found = np.zeros((number, number))
    found[np.ix_(used, used)] = solved / (x @ solved)[y.astype(bool)].mean()
    return found


def _all(dataset: object, part: str) -> list:
    return [dataset.sequences([group], ["item_ids"]) for group in dataset.row_groups(part)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "options",
    [TransitionOptions(decay=0.5), TransitionOptions("valid", 0.6, True), TransitionOptions("train", 0.4, False, True)],
    ids=str,
)
@pytest.mark.parametrize("with_texts", [False, True])
def test_the_fit_equals_a_regression_on_rows_built_one_by_one(options: TransitionOptions, with_texts: bool) -> None:
    number = fixtures.dataset("leave_one_out").num_items
    texts = np.random.default_rng(1).standard_normal((number, 6)).astype(np.float32) if with_texts else None
    fitted = fit_transitions(fixtures.dataset("leave_one_out"), texts, options)
    found = fitted.source @ fitted.target[:, :-1].T
    np.testing.assert_allclose(found, direct(options, texts), atol=5e-3)
    lengths = np.linalg.norm(fitted.target, axis=1)
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-5)
    assert not fitted.source[0].any() and not fitted.target[0, :-1].any()


def test_rare_items_are_left_out_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transitions, "MAX_ITEMS", 5)
    dataset = fixtures.dataset("leave_one_out")
    fitted = fit_transitions(dataset, None, TransitionOptions())
    inside = np.flatnonzero(fitted.source.any(1))
    counts = dataset.training_item_counts()
    assert 0 < len(inside) <= 5 and counts[inside].min() >= np.sort(counts)[-5]


def test_low_rank_keeps_the_largest_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit_transitions(fixtures.dataset("leave_one_out"), None, TransitionOptions())
    monkeypatch.setattr(transitions, "RANK", 3)
    part = fit_transitions(fixtures.dataset("leave_one_out"), None, TransitionOptions())
    assert part.source.shape[1] == 3 and part.target.shape[1] == 4
    assert whole.source.shape[1] > 3


def test_a_file_is_read_back_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    fitted = fit_transitions(fixtures.dataset("leave_one_out"), None, TransitionOptions())
    assert Transitions.load(tmp_path) is None
    fitted.save(tmp_path)
    again = Transitions.load(tmp_path)
    assert again is not None and again.fingerprint == fitted.fingerprint
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=f"{FILE}.*restore it from a copy of the run"):
        Transitions.load(tmp_path)


def test_a_forgotten_item_is_as_the_unknown_one() -> None:
    fitted = fit_transitions(fixtures.dataset("leave_one_out"), None, TransitionOptions())
    known = int(np.flatnonzero(fitted.source.any(1))[0])
    without = fitted.without(np.array([known]))
    assert not without.source[known].any() and np.array_equal(without.target[known], fitted.target[0])
    rest = np.arange(len(fitted.source)) != known
    assert np.array_equal(without.target[rest], fitted.target[rest])


def test_a_catalogue_of_equal_texts_is_solved() -> None:
    texts = np.ones((fixtures.dataset("leave_one_out").num_items, 6), np.float32)
    fitted = fit_transitions(fixtures.dataset("leave_one_out"), texts, TransitionOptions())
    assert np.isfinite(fitted.source).all() and fitted.source.any()
