"""Negatives drawn for the ranking head: what is drawn, how often, and the correction that undoes it."""

from functools import cache

import numpy as np
import pyarrow as pa
import pytest
import torch

from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.batch_spec import BatchSpec
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.drawn_negatives import HARD, STRIDE, Draw, NegativeDraws
from tests.helpers import fixtures, task_shop

COUNT = 5


@cache
def implicit() -> Dataset:
    """The clicks of the shop, each a positive event, with a context."""
    rows = task_shop.events()
    clicks = rows.filter(pa.array(rows["click"].to_numpy() == 1))
    context = {"device": "categorical", "price": "numeric"}
    return task_shop.prepared(fixtures.folder() / "implicit-shop", clicks, labels=None, context=context)


def draws(by: Draw = "uniform", count: int = COUNT, seed: int = 0) -> NegativeDraws:
    return NegativeDraws(implicit(), np.arange(1, implicit().num_items), by, count, seed)


def batch(drawn: NegativeDraws | None, epoch: int = 0, training: bool = True, fusion: str = "late") -> HybridBatch:
    dataset = implicit()
    pieces = [p for group in dataset.row_groups("train") for p in dataset.sequences([group]).pieces()]
    spec = BatchSpec(fusion, time_depth=0, visibility=dataset.visibility)  # type: ignore[arg-type]
    return Collator(dataset, spec, 0, training, draws=drawn)(pieces, epoch, 0)


@pytest.mark.parametrize("fusion", ["late", "early"])
def test_draws_stand_at_the_requests_of_their_exposures(fusion: str) -> None:
    plain, found = batch(None, fusion=fusion), batch(draws(), fusion=fusion)
    real = found.labels == 1
    assert torch.equal(found.target_items[real], plain.target_items) and (plain.labels == 1).all()
    for name in ("positions", "history_lengths"):
        assert torch.equal(getattr(found, name)[real], getattr(plain, name))
    users = {}
    for row, (position, item) in enumerate(zip(found.positions.tolist(), found.target_items.tolist(), strict=True)):
        query = int(found.target_query[row])
        piece = int(torch.searchsorted(found.query_offsets, query, right=True)) - 1
        key, draw = (int(found.user_ids[piece]), position % STRIDE), position // STRIDE
        seen = (int(found.query_times[query]), int(found.query_visible[query]), int(found.history_lengths[row]))
        users.setdefault(key, []).append((draw, item, seen))
    for rows in users.values():
        assert rows[0][0] == 0 and len({seen for *_, seen in rows}) == 1, "what a draw sees is what its exposure sees"
        assert rows[0][1] not in [item for draw, item, _ in rows if draw], "an exposure's own item is no negative of it"
        assert len(rows) <= COUNT + 1 and len({draw for draw, *_ in rows}) == len(rows)
    if fusion == "late":
        assert found.query_times.numel() == plain.query_times.numel(), "draws share the query of their exposure"


def test_draws_depend_on_epoch_and_seed_alone() -> None:
    first, again = batch(draws()), batch(draws())
    assert torch.equal(first.target_items, again.target_items)
    for other in (batch(draws(), epoch=1), batch(draws(seed=1))):
        assert first.target_items.tolist() != other.target_items.tolist()


@pytest.mark.parametrize("by", ["uniform", "popularity", "batch"])
def test_an_item_is_drawn_as_often_as_its_rate_says(by: Draw) -> None:
    dataset, count = implicit(), 100
    plain = batch(None)
    drawn = batch(draws(by, count))
    negatives = drawn.target_items[drawn.labels == 0]
    found = torch.bincount(negatives, minlength=dataset.num_items).numpy()[1:]
    own = torch.bincount(plain.target_items, minlength=dataset.num_items).numpy()[1:]
    rates = draws(by, count).rates(np.arange(1, dataset.num_items), 1)
    # Draws of an exposure's own item are left out.
    expected = rates * (plain.labels.numel() - own)
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max())
    assert rates.sum() == pytest.approx(count, rel=1e-5)
    assert (rates.std() > 0.5) == (by != "uniform")


def test_hard_draws_are_half_of_the_users_candidates() -> None:
    dataset = implicit()
    items, counts = np.arange(1, dataset.num_items), np.zeros(dataset.num_users, np.int64)
    counts[1] = 3  # the first user has candidates, others have none
    offsets = np.concatenate([[0], np.cumsum(counts)])
    drawn = NegativeDraws(dataset, items, "hard", 100, candidates=(np.array([2, 3, 5]), offsets))
    piece = next(p for p in dataset.sequences([dataset.row_groups("train")[0]]).pieces() if p.user_id == 1)
    rows = drawn.rows(piece, piece.exposures, 0, items)
    negatives = rows.events.item_ids[piece.exposures.size :]
    share = np.isin(negatives, [2, 3, 5]).mean()
    assert share == pytest.approx(HARD + (1 - HARD) * 3 / items.size, abs=0.06)
    rates = drawn.rates(items, 1)
    assert rates.sum() == pytest.approx(100, rel=1e-5) and rates[1] == pytest.approx(50 / 3 + 50 / items.size, rel=1e-5)
    assert drawn.rates(items, 2) == pytest.approx(np.full(items.size, 100 / items.size), rel=1e-5)


def test_training_is_corrected_by_an_offset_and_evaluation_by_weights() -> None:
    training, evaluation = batch(draws("popularity")), batch(draws("uniform"), training=False)
    rates = draws("popularity").rates(training.target_items.numpy(), 1)
    assert training.logit_offset is not None
    assert training.logit_offset.tolist() == pytest.approx((-np.log(rates)).tolist(), rel=1e-5)
    assert (training.weights == 1).all()
    assert evaluation.logit_offset is None
    negative = evaluation.labels == 0
    items = implicit().num_items - 1
    assert evaluation.weights[~negative].unique().tolist() == [1.0]
    assert evaluation.weights[negative].tolist() == pytest.approx([items / COUNT] * int(negative.sum()))


@pytest.mark.parametrize("by", ["uniform", "popularity", "batch"])
def test_the_corrected_logit_is_that_of_a_choice_from_the_catalogue(by: Draw) -> None:
    dataset = implicit()
    drawn = [batch(draws(by, 50), epoch) for epoch in range(4)]
    items = torch.cat([one.target_items for one in drawn])
    labels, offsets = (torch.cat([getattr(one, name) for one in drawn]) for name in ("labels", "logit_offset"))
    # A logit per item, fitted to its optimum, is the logit of the item's share of the exposures.
    logits = torch.zeros(dataset.num_items, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        given = logits[items] + offsets
        loss = torch.nn.functional.binary_cross_entropy_with_logits(given, labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    chosen = batch(None).target_items
    shares = torch.bincount(chosen, minlength=dataset.num_items)[1:] / chosen.numel()
    assert torch.sigmoid(logits[1:]).tolist() == pytest.approx(shares.tolist(), rel=0.1)
