"""Evidence: every column against a plain loop over the raw events, what it may see, and who predicts whom."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.evidence import CROSSES, FOLDS, GROUPS, Evidence, EvidenceModel, evidence_width, fold_of_users
from hllm_torchrec.data.evidence_fit import fit_evidence
from hllm_torchrec.data.item_factors import FactorOptions, event_values, fit_factors, training_ratings
from hllm_torchrec.data.item_statistics import ItemStatistics
from hllm_torchrec.data.past_events import Exposures
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.split import SPLITS
from tests.helpers import fixtures
from tests.helpers.growing_shop import NEW_ITEMS, append_day, prepare_shop
from tests.helpers.source_files import ITEMS, memory_source

NAMES = (*GROUPS, CROSSES)
QUICK = FactorOptions(factors=2, iterations=3)


@cache
def text() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(fixtures.dataset().num_items, 5)).astype(np.float32)


@cache
def fitted(delay: int = 0) -> EvidenceModel:
    return fit_evidence(fixtures.dataset(), NAMES, text(), delay, QUICK)


def evidence(delay: int = 0, dataset: Dataset | None = None) -> Evidence:
    dataset = dataset or fixtures.dataset()
    statistics = ItemStatistics.of_dataset(dataset)
    return Evidence(NAMES, fitted(delay), statistics, dataset.action_values, text(), delay)


@cache
def all_events() -> list[tuple[int, int, int, float]]:
    """(user, item, second, value) of every event of the shop once."""
    dataset, found = fixtures.dataset(), []
    for part in SPLITS:
        for piece in dataset.sequences(dataset.row_groups(part)).pieces():
            values = event_values(piece.labels, piece.actions, dataset.action_values)
            for k in range(piece.first_target, len(piece)):
                found.append((piece.user_id, int(piece.item_ids[k]), int(piece.timestamps[k]), float(values[k])))
    return found


def by_loops(user: int, item: int, second: int, delay: int, without: int | None) -> list[float]:
    """The columns of one exposure, from all events of the shop, in the order of GROUPS."""
    fit, events = fitted(delay).fit_without(without), all_events()
    before = [e for e in events if e[2] < second - delay]
    mine = sorted((e for e in before if e[0] == user), key=lambda e: e[2])
    rated = [e for e in mine if not np.isnan(e[3])]
    z = fit.posterior_mean(np.array([e[1] for e in rated], int), np.array([e[3] for e in rated]))
    of_item = [e[3] - fit.mean for e in before if e[1] == item and not np.isnan(e[3])]
    residuals = [e[3] - fit.mean - fit.bias[e[1]] for e in rated]
    user_mean = sum(residuals) / (len(residuals) + 5)
    recent = residuals[-10:]
    unit = text() - text()[1:].mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    neighbors = []
    for sharpness in (5.0, 10.0):
        weights = [np.exp(sharpness * unit[item] @ unit[e[1]]) for e in rated]
        surplus = sum(w * (r - user_mean) for w, r in zip(weights, residuals, strict=True))
        neighbors.append(surplus / (sum(weights) + 5 * np.exp(sharpness * 0.2)))
    taste = _taste(item, second, rated, residuals, delay, without)
    columns = [
        float(fit.predict(z, np.array([item]))[0]),
        fit.bias[item],
        sum(of_item) / (len(of_item) + 5),
        np.log1p(len(of_item)),
        user_mean,
        sum(recent) / (len(recent) + 3),
        np.log1p(len(mine)),
        np.log1p(second - mine[-1][2]) if mine else 0.0,
        *neighbors,
        taste,
    ]
    scaled = [(x - c) / s for x, c, s in zip(columns, fitted(delay).center, fitted(delay).spread, strict=False)]
    crossed = [min(max(scaled[k], -4.0), 4.0) for k in (0, 2, 3, 4, 5, 6, 7, 9)]
    return columns + [a * b for n, a in enumerate(crossed) for b in crossed[n:]]


def _taste(
    item: int, second: int, rated: list[tuple[int, int, int, float]], residuals: list[float], delay: int, without: Any
) -> float:
    """Posterior mean of the value by a regression whose rows are written out one by one."""
    fit, model = fitted(delay).fit_without(without), fitted(delay)
    unit = text() - text()[1:].mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)

    def describe(item: int, second: int) -> np.ndarray:
        of_item = [e[3] - fit.mean for e in all_events() if e[1] == item and e[2] < second - delay and e[3] == e[3]]
        statistics = np.array([sum(of_item) / (len(of_item) + 5), np.log1p(len(of_item))])
        statistics = (statistics - model.taste_center) / model.taste_spread
        return np.concatenate([fit.loadings[item], statistics, unit[item] @ model.taste_text])

    precision, weighted = np.eye(describe(item, second).size), 0.0
    for event, residual in zip(rated, residuals, strict=True):
        d = describe(event[1], event[2])
        precision, weighted = precision + np.outer(d, d) / fit.noise, weighted + d * residual / fit.noise
    z = np.linalg.solve(precision, weighted * np.ones(len(precision)))
    return float(fit.mean + fit.bias[item] + z @ describe(item, second))


def columns_of(part: str, delay: int = 0) -> dict[tuple[int, int, int], np.ndarray]:
    """(user, item, second) -> unscaled columns, of one exposure at every second of every user of a part."""
    dataset, found, model = fixtures.dataset(), {}, fitted(delay)
    for piece in dataset.sequences(dataset.row_groups(part)).pieces():
        targets = piece.exposures
        seconds, items = piece.timestamps[targets], piece.item_ids[targets]
        seen = np.searchsorted(piece.timestamps, seconds - delay)
        columns = evidence(delay).columns(piece, seen, items, seconds, piece.user_id, fitted=part == "train")
        for key, row in zip(zip(items.tolist(), seconds.tolist()), columns, strict=True):
            found[piece.user_id, *key] = row * model.spread + model.center
    return found


@pytest.mark.parametrize(("part", "delay"), [("test", 0), ("train", 0), ("test", 40_000)])
def test_columns_are_those_of_a_plain_loop_over_the_events(part: str, delay: int) -> None:
    found = columns_of(part, delay)
    assert len(found) > 20
    for (user, item, second), row in list(found.items())[::9]:
        without = int(fold_of_users(np.array([user]))[0]) if part == "train" else None
        np.testing.assert_allclose(row, by_loops(user, item, second, delay, without), rtol=2e-4, atol=2e-4)


def test_exposures_of_several_users_have_the_columns_of_one_user_at_a_time() -> None:
    by_length = sorted(fixtures.pieces("test"), key=len)
    pieces, computed = [by_length[0][:0], *by_length[:2], by_length[-1]], evidence()
    items = [np.array(one) for one in ([3], [1, 3, 0, 7], [], [7, 2])]
    second = max(int(piece.timestamps.max(initial=0)) for piece in pieces) - 1
    seen = [int(np.searchsorted(piece.timestamps, second)) for piece in pieces]
    pasts = [computed.past(piece[:count], np.array([count])) for piece, count in zip(pieces, seen, strict=True)]
    sizes = [one.size for one in items]
    asked = Exposures(
        pasts, sizes, np.repeat(np.arange(4), sizes), np.concatenate(items).astype(int), np.full(sum(sizes), second)
    )
    found = np.split(computed.of_exposures(asked), np.cumsum(sizes)[:-1])
    for ours, piece, count, ids in zip(found, pieces, seen, items, strict=True):
        at = np.full(ids.size, second)
        theirs = computed.columns(piece, np.full(ids.size, count), ids.astype(int), at, 7, fitted=False)
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert seen[0] == 0 and seen[-1] < len(pieces[-1]) and found[-1].std() > 0.1


def test_item_statistics_count_the_events_before_a_second() -> None:
    statistics, known = ItemStatistics.of_dataset(fixtures.dataset()), [e for e in all_events() if e[3] == e[3]]
    for second in (0, known[0][2], known[40][2], known[40][2] + 1, max(e[2] for e in known) + 1):
        items = np.array([0, 1, 5, 5, fixtures.dataset().num_items + 2])
        count, total = statistics.before(items, np.full(items.size, second))
        values = [[e[3] for e in known if e[1] == item and e[2] < second] for item in items]
        np.testing.assert_array_equal(count, [len(one) for one in values])
        np.testing.assert_allclose(total, [sum(one) for one in values])
    empty = ItemStatistics(np.empty(0, np.int64), np.zeros(1))
    assert [array.tolist() for array in empty.before(np.array([0, 4]), np.array([9, 9]))] == [[0, 0], [0.0, 0.0]]


def test_each_training_user_is_predicted_by_a_fit_without_its_fold() -> None:
    dataset = fixtures.dataset()
    ratings = training_ratings(dataset, 100)
    fold = int(fold_of_users(ratings.user_ids)[0])
    without = fit_factors(ratings.of_users(fold_of_users(ratings.user_ids) != fold), dataset.num_items, QUICK)
    np.testing.assert_array_equal(fitted().fit_without(fold).loadings, without.loadings)
    assert np.unique(fold_of_users(np.arange(1, 1000))).size == FOLDS


def test_a_saved_model_is_read_back_and_later_items_are_unknown_to_it(tmp_path) -> None:
    fitted().save(tmp_path)
    read = EvidenceModel.load(tmp_path)
    assert read is not None and read.fingerprint == fitted().fingerprint
    piece = next(fixtures.dataset().sequences(fixtures.dataset().row_groups("test")).pieces())
    new, at = np.array([fixtures.dataset().num_items]), np.array([int(piece.timestamps[-1]) + 1])
    seen, more = np.array([len(piece)]), evidence().with_new_items(text()[3:4])
    late = more.columns(piece, seen, new, at, piece.user_id, False)
    same_text = more.columns(piece, seen, np.array([3]), at, piece.user_id, False)
    np.testing.assert_array_equal(late[:, 8:10], same_text[:, 8:10])  # neighbors read the text
    unscaled = late[0] * fitted().spread + fitted().center
    np.testing.assert_allclose(unscaled[[1, 2, 3]], 0, atol=1e-5)  # no bias, no events


def test_a_day_that_is_appended_changes_no_earlier_column(tmp_path: Path) -> None:
    before = Dataset.open(prepare_shop(tmp_path))
    old = [columns_in(before, part) for part in SPLITS]
    after = append_day(tmp_path)
    assert after.num_items == before.num_items + NEW_ITEMS
    for part, earlier in zip(SPLITS, old, strict=True):
        later = columns_in(after, part)
        assert len(earlier) > 20 and later.keys() >= earlier.keys()
        for key, row in earlier.items():
            np.testing.assert_array_equal(later[key], row)


def columns_in(dataset: Dataset, part: str) -> dict[tuple[int, int, int], np.ndarray]:
    """(user, item, second) -> columns of the exposures of a part."""
    texts = np.random.default_rng(3).normal(size=(dataset.num_items, 5)).astype(np.float32)
    texts[: len(text())] = text()
    statistics = ItemStatistics.of_dataset(dataset)
    of_run = Evidence(NAMES, fitted(), statistics, dataset.action_values, texts)
    found = {}
    for piece in dataset.sequences(dataset.row_groups(part)).pieces():
        targets = piece.exposures
        seconds, items = piece.timestamps[targets], piece.item_ids[targets]
        seen = np.searchsorted(piece.timestamps, seconds)
        columns = of_run.columns(piece, seen, items, seconds, piece.user_id, fitted=part == "train")
        found |= {(piece.user_id, int(i), int(s)): row for i, s, row in zip(items, seconds, columns, strict=True)}
    return found


def test_without_a_file_a_run_with_evidence_is_refused(tmp_path) -> None:
    from hllm_torchrec.data.evidence import run_evidence

    assert run_evidence((), tmp_path) is None
    with pytest.raises(ValueError, match=r"evidence.npz: no such file, but data.evidence is \['items'\]"):
        run_evidence(("items",), tmp_path)


def test_the_first_weights_are_the_logistic_regression_of_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    from hllm_torchrec.data.evidence_fit import _logistic_regression

    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4))
    y = (rng.random(300) < 1 / (1 + np.exp(-x @ [1.0, -2.0, 0.0, 0.5] - 0.3))).astype(float)
    expected: Any = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(x, y)
    np.testing.assert_allclose(
        _logistic_regression(x, y, np.ones(4)), [*expected.intercept_, *expected.coef_[0]], atol=1e-5
    )
    assert evidence_width(tuple(GROUPS)) == 11 and evidence_width(NAMES) == 11 + 8 * 9 // 2


@pytest.mark.parametrize("users", [1, 6])
def test_folds_whose_other_users_tell_nothing_are_refused(tmp_path: Path, users: int) -> None:
    # User 6 is alone in a fold, and the last user is the only one with different values.
    assert np.bincount(fold_of_users(np.arange(1, 7)))[fold_of_users(np.array([6]))] == 1
    rated = ((user, n, n % 5 + 1 if user == users else 5) for n in range(40) for user in range(1, users + 1))
    events = [(f"u{user}", f"i{n % 5}", value, 9 * n + user) for user, n, value in rated]
    root = prepare(memory_source(tmp_path / "shop", events, ITEMS), tmp_path / "data")
    with pytest.raises(ValueError, match=f"{users} training users with values, and leaving out .* drop data.evid"):
        fit_evidence(Dataset.open(root), NAMES[:3], None, 0, QUICK)
