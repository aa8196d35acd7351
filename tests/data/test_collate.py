"""Batches against loops over events: who sees what, and what stands in every slot."""

import dataclasses
from datetime import UTC, datetime
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.batch_spec import BatchSpec, check_batch_spec
from hllm_torchrec.data.collate import Collator, gather_bags
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.events import Events, Piece
from hllm_torchrec.data.numeric_features import NUMERIC_FEATURES, numeric_columns
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.data.split import Split
from hllm_torchrec.modules.features.hybrid import ACTION_GATE
from hllm_torchrec.modules.features.timestamps import TIME_FEATURES
from tests.helpers import fixtures

FUSIONS = ("late", "early", "none")
EVERYTHING: dict[str, Any] = {
    "item_features": ("genres",),
    "user_features": ("country",),
    "numeric_features": tuple(NUMERIC_FEATURES),
    "action_gate": True,
}


def recipe(fusion: str = "late", **options: Any) -> BatchSpec:
    return BatchSpec(fusion=fusion, **options)  # type: ignore[arg-type]


def collate(
    what: BatchSpec,
    pieces: list[Piece],
    training: bool = False,
    step: int = 0,
    rank: int = 0,
    seed: int = 0,
) -> HybridBatch:
    return Collator(fixtures.dataset(), what, seed, training)(pieces, 0, step, rank)


def piece(times: list[int], labels: list[float | None], first: int = 0, offset: int = 0) -> Piece:
    """Items 1, 2, ...; actions 1..5 in turn."""
    n = len(times)
    events = Events.at(times, item_ids=np.arange(1, n + 1), labels=labels, actions=np.arange(n) % 5 + 1)
    return Piece(**events.columns, user_id=7, offset=offset, first_target=first)


def some_pieces() -> list[Piece]:
    """Whole users, users of a later part, a stretch of a user, and one without exposures."""
    user = fixtures.pieces("train")[4]
    stretch = user.cut(5, 25, 14)
    silent = piece([1, 1, 2], [None, None, None])
    return [*fixtures.pieces("train")[:5], *fixtures.pieces("valid")[:3], stretch, silent]


# ------------------------------------------------------------------------------- naive counterparts


def kept_events(p: Piece, what: BatchSpec) -> list[int]:
    return [i for i in range(len(p.item_ids)) if what.history == "all" or p.labels[i] == 1]


def exposures(p: Piece) -> list[int]:
    return [i for i in range(p.first_target, len(p.item_ids)) if not np.isnan(p.labels[i])]


def seen_by(p: Piece, target: int, what: BatchSpec) -> list[int]:
    if what.visibility == "second":
        return [i for i in kept_events(p, what) if p.timestamps[i] < p.timestamps[target]]
    return [i for i in kept_events(p, what) if i < target]


def generated(p: Piece, what: BatchSpec, training: bool) -> list[tuple[int, int]]:
    """(row in the kept history, event that follows it) of every generative target."""
    kept = kept_events(p, what)
    pairs = []
    for row in range(len(kept) - 1 if training and what.negatives else 0):
        following = kept[row + 1]
        is_negative = p.labels[following] == 0
        if following >= p.first_target and not (what.positive_targets_only and is_negative):
            pairs.append((row, following))
    return pairs


def history(p: Piece, what: BatchSpec, training: bool) -> list[int]:
    """The kept events that somebody needs."""
    rows = [len(seen_by(p, t, what)) for t in exposures(p)]
    rows += [row + 1 for row, _ in generated(p, what, training)]
    return kept_events(p, what)[: max(rows, default=0)]


VARIANTS = list(product(FUSIONS, ("all", "positive"), ("second", "position")))


@pytest.mark.parametrize(("fusion", "which", "visibility"), VARIANTS)
def test_an_exposure_sees_what_its_rule_allows_and_nothing_else(fusion: str, which: str, visibility: str) -> None:
    what, pieces = recipe(fusion, history=which, visibility=visibility), some_pieces()
    batch = collate(what, pieces)
    owner = np.repeat(np.arange(len(pieces)), np.diff(batch.query_offsets.numpy()))
    number = 0
    for index, p in enumerate(pieces):
        for target in exposures(p):
            query = int(batch.target_query[number])
            assert owner[query] == index
            start = int(batch.seq_offsets[index])
            rows = slice(start, start + int(batch.query_visible[query]))
            expected = seen_by(p, target, what)
            assert batch.item_ids[rows].tolist() == p.item_ids[expected].tolist()
            assert batch.timestamps[rows].tolist() == p.timestamps[expected].tolist()
            assert rows.stop <= int(batch.seq_offsets[index + 1])
            assert int(batch.query_times[query]) == p.timestamps[target]
            number += 1
    assert number == batch.num_exposures > 80


@pytest.mark.parametrize(("fusion", "which", "visibility"), VARIANTS)
def test_an_exposure_is_identified_and_described(fusion: str, which: str, visibility: str) -> None:
    pieces = some_pieces()
    batch = collate(recipe(fusion, history=which, visibility=visibility), pieces)
    expected = [(p, t) for p in pieces for t in exposures(p)]
    assert batch.target_items.tolist() == [p.item_ids[t] for p, t in expected]
    assert batch.labels.tolist() == [p.labels[t] for p, t in expected]
    assert batch.labels.dtype == torch.float32
    assert batch.positions.tolist() == [p.offset + t for p, t in expected]
    earlier = [p.offset + sum(p.timestamps < p.timestamps[t]) for p, t in expected]
    assert batch.history_lengths.tolist() == earlier
    assert batch.weights.tolist() == [1.0] * len(expected)
    assert batch.user_ids.tolist() == [p.user_id for p in pieces]


def test_a_rating_is_the_auxiliary_target() -> None:
    """Actions 1..6 here ("view" is the sixth) on [-1, 1]; the unknown action has no value."""
    p = piece([1, 2, 3, 4], [1.0, 0.0, 1.0, 0.0])
    p = dataclasses.replace(p, actions=np.array([1, 6, 3, 0]))
    values = collate(recipe(), [p]).target_values
    torch.testing.assert_close(values, torch.tensor([-1.0, torch.nan, 0.0, torch.nan]), equal_nan=True)


def test_exposures_of_one_moment_share_a_query_in_late_fusion_only() -> None:
    p = piece([1, 1, 2, 5, 5, 5, 9], [1, 0, None, 1, 0, 0, 1])
    late, early = collate(recipe("late"), [p, p]), collate(recipe("early"), [p, p])
    assert late.query_times.tolist() == [1, 5, 9, 1, 5, 9]
    assert late.query_visible.tolist() == [0, 3, 6, 0, 3, 6]
    assert late.query_offsets.tolist() == [0, 3, 6]
    assert late.target_query.tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 4, 4, 4, 5]
    assert late.query_target.numel() == 0
    assert early.query_times.tolist() == [1, 1, 5, 5, 5, 9] * 2
    assert early.query_offsets.tolist() == [0, 6, 12]
    assert early.target_query.tolist() == early.query_target.tolist() == list(range(12))


def test_by_position_exposures_of_one_second_see_each_other_in_order() -> None:
    p = piece([1, 5, 5], [1, 0, 1])
    assert collate(recipe("late", visibility="position"), [p]).query_visible.tolist() == [0, 1, 2]


def test_history_that_nobody_sees_is_left_out() -> None:
    assert collate(recipe(), [piece([1, 2, 3, 3], [1, 0, 1, 1])]).item_ids.tolist() == [1, 2]
    assert collate(recipe(), [piece([1, 2], [None, None])]).item_ids.numel() == 0


# ------------------------------------------------------------------------------------- slots


Slot = dict[str, list[int]]


def naive_slots(pieces: list[Piece], what: BatchSpec, training: bool = False) -> list[Slot]:
    """Every slot's bags: histories, then queries, then the targets of late fusion."""
    histories: list[Slot] = []
    queries: list[Slot] = []
    targets: list[Slot] = []
    for p in pieces:
        for i in history(p, what, training):
            action = int(p.actions[i])
            histories.append(
                item_bags(int(p.item_ids[i]))
                | time_bags(int(p.timestamps[i]))
                | {"action": [action], ACTION_GATE: [action]}
            )
        moments = set()
        for t in exposures(p):
            query = {"action": [0], "country": country(p.user_id)} | time_bags(int(p.timestamps[t]))
            moment = (len(seen_by(p, t, what)), p.timestamps[t])
            if what.fusion == "early":
                queries.append(query | item_bags(int(p.item_ids[t])))
            elif moment not in moments:
                queries.append(query)
            moments.add(moment)
            targets.append(item_bags(int(p.item_ids[t])))
    if what.fusion == "none":
        return histories
    return histories + queries + (targets if what.fusion == "late" else [])


def item_bags(item: int) -> Slot:
    genres = fixtures.dataset().items["feature_genres"].to_pylist()
    return {"item_id": [item], "genres": genres[item - 1]}


def country(user: int) -> list[int]:
    found: list[int] = fixtures.dataset().users["feature_country"].to_pylist()[user - 1]
    return found


def time_bags(second: int) -> Slot:
    moment = datetime.fromtimestamp(second, UTC)
    parts = (moment.year, moment.month, moment.day, moment.hour, moment.minute, moment.second)
    return {name: [part] for name, part in zip(TIME_FEATURES, parts)}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_slot_has_the_bags_of_its_event_request_or_target(fusion: str, training: bool) -> None:
    what, pieces = recipe(fusion, negatives=4, **EVERYTHING), some_pieces()
    batch = collate(what, pieces, training)
    expected = naive_slots(pieces, what, training)
    assert batch.features.stride() == len(expected)
    tables = what.tables(fixtures.dataset())
    assert batch.features.keys() == [*tables, *TIME_FEATURES]
    for name in batch.features.keys():
        found = [bag.tolist() for bag in batch.features[name].to_dense()]
        assert found == [slot.get(name, []) for slot in expected], name


def test_table_sizes_hold_every_id() -> None:
    what, dataset = recipe("early", **EVERYTHING), fixtures.dataset()
    tables = what.tables(dataset)
    assert tables["item_id"] == fixtures.ITEMS + 1
    assert tables["action"] == tables[ACTION_GATE] == len(fixtures.ACTIONS) + 1
    assert tables["genres"] == len(fixtures.GENRES) + 1 and tables["country"] == len(fixtures.COUNTRIES) + 1
    features = collate(what, some_pieces()).features
    assert all(int(features[name].values().max()) < rows for name, rows in tables.items())


def test_features_that_are_off_have_no_bags() -> None:
    off = recipe("early", item_id=False, action=False, time_depth=0)
    batch = collate(off, some_pieces())
    assert batch.features.keys() == [] and off.tables(fixtures.dataset()) == {}
    assert batch.features.stride() == batch.item_ids.numel() + batch.num_exposures
    assert batch.numeric is None
    shallow = collate(recipe("early", item_id=False, action=False, time_depth=2), some_pieces())
    assert shallow.features.keys() == ["time_year", "time_month"]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_numeric_features_stand_at_the_queries_alone(fusion: str) -> None:
    what, pieces = recipe(fusion, numeric_features=("user_mean", "log_gap")), some_pieces()
    batch = collate(what, pieces)
    assert batch.numeric is not None and batch.numeric.dtype == torch.float32
    start, count = batch.item_ids.numel(), batch.query_times.numel() if fusion != "none" else 0
    assert batch.numeric.shape == (batch.features.stride(), 2)
    outside = torch.cat([batch.numeric[:start], batch.numeric[start + count :]])
    assert not outside.any()
    if fusion == "none":
        return
    expected = [
        numeric_columns(what.numeric_features, p.timestamps, p.labels, np.array(exposures(p), np.int64)) for p in pieces
    ]
    at_exposures = batch.numeric[start : start + count][batch.target_query]
    np.testing.assert_array_equal(at_exposures.numpy(), np.concatenate(expected))


def test_item_vectors_are_those_of_the_unique_items() -> None:
    vectors = np.random.default_rng(0).normal(size=(fixtures.ITEMS + 1, 3)).astype(np.float32)
    batch = Collator(fixtures.dataset(), recipe(), item_vectors=vectors)(some_pieces(), 0, 0)
    assert batch.item_vectors is not None
    np.testing.assert_array_equal(batch.item_vectors.numpy(), vectors[batch.unique_items.numpy()])
    assert collate(recipe(), some_pieces()).item_vectors is None


# ------------------------------------------------------------------------------- training


def item_slots(batch: HybridBatch) -> Tensor:
    return batch.features["item_id"].values()


def test_ids_are_dropped_in_training_alone_by_seed_step_and_rank() -> None:
    what, pieces = recipe("early", id_dropout=0.4), some_pieces()
    whole = item_slots(collate(recipe("early"), pieces))
    assert torch.equal(item_slots(collate(what, pieces)), whole)
    dropped = item_slots(collate(what, pieces, training=True))
    kept = dropped == whole
    assert (dropped[~kept] == 0).all()
    assert 0.3 < float((~kept).float().mean()) < 0.5
    assert torch.equal(item_slots(collate(what, pieces, training=True)), dropped)
    others: list[dict[str, int]] = [{"step": 1}, {"rank": 1}, {"seed": 1}]
    for other in others:
        assert not torch.equal(item_slots(collate(what, pieces, training=True, **other)), dropped)


def test_a_dropped_id_leaves_text_features_and_targets_alone() -> None:
    pieces = some_pieces()
    plain = collate(recipe("late", **EVERYTHING), pieces, training=True)
    dropping = collate(recipe("late", **EVERYTHING, id_dropout=0.9), pieces, training=True)
    for name in ("unique_items", "item_ids", "target_items", "history_index", "target_index"):
        assert torch.equal(getattr(plain, name), getattr(dropping, name)), name
    assert torch.equal(plain.features["genres"].values(), dropping.features["genres"].values())


def test_negatives_are_distinct_items_that_depend_on_seed_epoch_and_step_alone() -> None:
    dataset, what = fixtures.dataset(), recipe(negatives=10)
    draw = Collator(dataset, what, seed=3, training=True)
    found = draw.negatives(1, 2)
    assert len(set(found.tolist())) == 10 and found.min() >= 1 and found.max() <= fixtures.ITEMS
    assert np.array_equal(Collator(dataset, what, seed=3).negatives(1, 2), found)
    ranks = [draw(some_pieces()[rank : rank + 1], 1, 2, rank).negative_items for rank in range(3)]
    assert all(x.tolist() == found.tolist() for x in ranks)
    draws = {tuple(draw.negatives(epoch, step)) for epoch, step in product(range(3), range(3))}
    draws.add(tuple(Collator(dataset, what, seed=4).negatives(1, 2)))
    assert len(draws) == 10


def test_every_item_is_drawn_about_as_often() -> None:
    draw = Collator(fixtures.dataset(), recipe(negatives=8))
    counts = np.bincount(np.concatenate([draw.negatives(0, step) for step in range(2000)]))
    assert counts[0] == 0
    expected = 2000 * 8 / fixtures.ITEMS  # 400, with a standard deviation of 18
    assert np.abs(counts[1:] - expected).max() < 5 * 18


def test_more_negatives_than_items_are_all_items() -> None:
    draw = Collator(fixtures.dataset(), recipe(negatives=500))
    assert draw.negatives(0, 0).tolist() == list(range(1, fixtures.ITEMS + 1))


@pytest.mark.parametrize(("which", "positive_only"), list(product(("all", "positive"), (True, False))))
def test_a_position_generates_the_next_event_of_its_own_piece(which: str, positive_only: bool) -> None:
    what = recipe(history=which, positive_targets_only=positive_only, negatives=4)
    pieces = some_pieces()
    batch = collate(what, pieces, training=True)
    expected = []
    for index, p in enumerate(pieces):
        start = int(batch.seq_offsets[index])
        rows = [batch.item_ids[start + row].item() for row, _ in generated(p, what, True)]
        kept = kept_events(p, what)
        assert rows == [p.item_ids[kept[row]] for row, _ in generated(p, what, True)]
        expected += [(start + row, p.item_ids[event]) for row, event in generated(p, what, True)]
    assert list(zip(batch.next_rows.tolist(), batch.next_items.tolist(), strict=True)) == expected
    assert len(expected) > 20
    if positive_only:
        labels = [p.labels[event] for p in pieces for _, event in generated(p, what, True)]
        assert not [x for x in labels if x == 0]


@pytest.mark.parametrize(("negatives", "training"), [(0, True), (4, False)])
def test_nothing_is_generated_in_evaluation_or_without_negatives(negatives: int, training: bool) -> None:
    batch = collate(recipe(negatives=negatives), some_pieces(), training)
    assert batch.next_rows.numel() == batch.next_items.numel() == batch.next_index.numel() == 0
    assert batch.negative_items.numel() == negatives


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_item_stands_once_and_every_index_leads_back(fusion: str) -> None:
    batch = collate(recipe(fusion, negatives=6), some_pieces(), training=True)
    unique = batch.unique_items
    assert torch.equal(unique, torch.unique(unique))
    pairs = {
        "history_index": "item_ids",
        "target_index": "target_items",
        "next_index": "next_items",
        "negative_index": "negative_items",
    }
    for index, items in pairs.items():
        assert torch.equal(unique[getattr(batch, index)], getattr(batch, items)), index
    used = torch.cat([getattr(batch, index) for index in pairs])
    assert torch.equal(torch.unique(used), torch.arange(unique.numel()))


# ------------------------------------------------------------------------------- the batch itself


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_an_empty_batch_has_every_field_of_a_full_one(fusion: str, training: bool) -> None:
    what = recipe(fusion, negatives=4, **EVERYTHING)
    full, empty = (collate(what, pieces, training) for pieces in (some_pieces(), []))
    assert empty.seq_offsets.tolist() == empty.query_offsets.tolist() == [0]
    assert torch.equal(empty.unique_items, empty.negative_items.sort().values)
    assert torch.equal(empty.negative_items, full.negative_items), "all ranks share them"
    assert empty.features.keys() == full.features.keys() and empty.features.stride() == 0
    for field in dataclasses.fields(HybridBatch):
        theirs, ours = getattr(full, field.name), getattr(empty, field.name)
        if isinstance(theirs, Tensor):
            assert ours.dtype == theirs.dtype and ours.shape[1:] == theirs.shape[1:], field.name
            is_empty = field.name not in (
                "seq_offsets",
                "query_offsets",
                "unique_items",
                "negative_items",
                "negative_index",
            )
            assert not is_empty or ours.shape[0] == 0, field.name


def test_a_user_alone_gives_the_same_part_of_the_batch() -> None:
    what, pieces = recipe("early", **EVERYTHING), some_pieces()
    whole = collate(what, pieces)
    for index, p in enumerate(pieces):
        alone = collate(what, [p])
        rows = slice(int(whole.seq_offsets[index]), int(whole.seq_offsets[index + 1]))
        asks = slice(int(whole.query_offsets[index]), int(whole.query_offsets[index + 1]))
        assert torch.equal(whole.item_ids[rows], alone.item_ids)
        assert torch.equal(whole.query_visible[asks], alone.query_visible)
        assert torch.equal(whole.labels[asks], alone.labels)


def test_a_batch_moves_as_a_whole() -> None:
    batch = collate(recipe("late", **EVERYTHING), some_pieces())
    moved = batch.to(torch.device("cpu"))
    for field in dataclasses.fields(HybridBatch):
        ours, theirs = getattr(moved, field.name), getattr(batch, field.name)
        if isinstance(theirs, Tensor):
            torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0, atol=0)
        elif field.name == "features":
            assert ours.keys() == theirs.keys() and torch.equal(ours.values(), theirs.values())
        else:
            assert ours is theirs is None, field.name


def test_bags_are_gathered_in_order_and_a_negative_id_has_none() -> None:
    values, offsets = np.array([7, 8, 9]), np.array([0, 0, 2, 3])
    found, lengths = gather_bags(values, offsets, np.array([2, -1, 1, 0, 1]))
    assert found.tolist() == [9, 7, 8, 7, 8] and lengths.tolist() == [1, 0, 2, 0, 2]


def test_features_that_the_dataset_lacks_are_named_with_those_it_has() -> None:
    dataset = fixtures.dataset()
    assert check_batch_spec(recipe(**EVERYTHING), dataset) == []
    problems = check_batch_spec(
        recipe(item_features=("genre",), user_features=("age",), numeric_features=("mean",)), dataset
    )
    assert problems == [
        "data.item_features: 'genre': not in the dataset; it has ['genres']",
        "data.user_features: 'age': not in the dataset; it has ['country']",
        "data.numeric_features: 'mean': unknown; there are ['history_length', 'log_gap', 'user_mean'], or "
        "module:Name of your own",
    ]


def item_ids_of_slots(batch: HybridBatch) -> list[int]:
    bags = batch.features["item_id"]
    assert set(bags.lengths().tolist()) <= {0, 1}
    return bags.values().tolist()


def test_cold_items_are_read_as_unknown_and_in_training_a_share_of_the_others_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    what = recipe("early", cold_dropout=0.5)
    dataset, pieces = Dataset.open(fixtures.dataset().root), some_pieces()
    cold = np.arange(dataset.num_items) % 5 == 2
    monkeypatch.setattr(dataset, "training_item_counts", lambda: np.where(cold, 0, 3))
    vectors = np.ones((dataset.num_items, 2), np.float32)
    plain = collate(recipe("early"), pieces)
    items = item_ids_of_slots(plain)
    assert any(cold[i] for i in items)
    scored = Collator(dataset, what, 0, False, vectors)(pieces, 0, 0)
    assert item_ids_of_slots(scored) == [0 if cold[i] else i for i in items]
    assert (scored.item_vectors[:, 0] == 0).tolist() == cold[scored.unique_items.numpy()].tolist()
    trained = Collator(dataset, what, 0, True, vectors)(pieces, 0, 0)
    unknown = set(trained.unique_items[trained.item_vectors[:, 0] == 0].tolist())
    known = {i for i in items if not cold[i]}
    assert 0.25 < len(unknown & known) / len(known) < 0.75
    assert item_ids_of_slots(trained) == [0 if i in unknown else i for i in items], "ID and vectors go together"
    of_items = Collator(dataset, what).item_features(np.arange(1, dataset.num_items))
    assert of_items["item_id"].values().tolist() == [0 if cold[i] else i for i in range(1, dataset.num_items)]


def test_items_held_out_of_train_are_no_negatives(tmp_path: Any) -> None:
    mapping = fixtures.write_shop(tmp_path / "shop")
    split = Split(hold_out_items=0.4)
    dataset = Dataset.open(prepare(table(mapping), tmp_path / "data", split=split))
    counts = dataset.training_item_counts()
    drawn = np.concatenate([Collator(dataset, recipe(negatives=9)).negatives(0, step) for step in range(20)])
    assert set(drawn.tolist()) == set(np.flatnonzero(counts).tolist())
    assert (counts[1:] == 0).sum() > 8
    every = Collator(dataset, recipe(negatives=99)).negatives(0, 0)
    assert sorted(every.tolist()) == np.flatnonzero(counts).tolist()


def test_with_a_feedback_delay_an_item_is_predicted_where_its_request_would_have_been() -> None:
    users, delay = some_pieces(), 80_000
    batch = collate(recipe("none", negatives=4, feedback_delay=delay), users, training=True)
    expected, at = [], 0
    for p, length in zip(users, batch.seq_offsets.diff().tolist(), strict=True):
        for i in range(max(1, p.first_target), len(p)):
            seen = int((p.timestamps < p.timestamps[i] - delay).sum())
            if seen and p.labels[i] != 0:
                expected.append((at + seen - 1, int(p.item_ids[i])))
        at += length
    assert list(zip(batch.next_rows.tolist(), batch.next_items.tolist(), strict=True)) == expected and expected
