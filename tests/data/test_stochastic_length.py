"""Stochastic Length against the paper's rule, and what it leaves alone: exposures, targets, evaluation."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.batch_spec import BatchSpec
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.events import Piece
from hllm_torchrec.data.loader import Loader, LoaderSpec
from hllm_torchrec.data.stochastic_length import StochasticLength
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.models.assembly import build_experiment
from tests.helpers import fixtures, naive_model
from tests.helpers.training_fixtures import config, lines, train

DRAWS = 2000
SHORT = StochasticLength(1.6, 32, "uniform")
"""Keeps 16 of a longer history."""


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def draw(rule: StochasticLength, events: int, users: int = DRAWS) -> list[np.ndarray]:
    times = np.arange(events) * 100
    return [rule.choose(times, epoch=0, user=user, offset=0) for user in range(users)]


# ------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize("alpha", [1.6, 1.9])
@pytest.mark.parametrize("events", [20, 40, 60, 64])
def test_lengths_and_probabilities_are_those_of_equation_4(alpha: float, events: int) -> None:
    found = Counter(chosen.size for chosen in draw(StochasticLength(alpha, 64), events))
    short = int(64 ** (alpha / 2))
    probability = 1 - 64**alpha / events**2 if events > 64 ** (alpha / 2) else 0.0
    assert set(found) <= {short, events}
    spread = (probability * (1 - probability) / DRAWS) ** 0.5
    assert abs(found[events] / DRAWS - (1 - probability)) <= 4 * spread


def test_alpha_2_never_shortens() -> None:
    assert all(chosen.size == 64 for chosen in draw(StochasticLength(2.0, 64), 64, users=50))


def test_what_remains_is_in_order_without_repeats_and_begins_with_the_first() -> None:
    for chosen in draw(SHORT, 30, users=100):
        assert chosen[0] == 0 and (np.diff(chosen) > 0).all() and chosen[-1] < 30


def test_uniform_events_remain_alike_and_recent_ones_by_their_age() -> None:
    expected = {"uniform": np.ones(31), "recent": 1 - np.arange(30, -1, -1) * 100 / 3101}
    for choice, weights in expected.items():
        shortened = [c for c in draw(StochasticLength(1.2, 32, choice), 32) if c.size < 32]  # type: ignore[arg-type]
        share = np.bincount(np.concatenate(shortened), minlength=32)[1:] / len(shortened)
        one = shortened[0].size - 1
        if choice == "uniform":
            np.testing.assert_allclose(share, one / 31, atol=0.06)
        else:
            assert np.corrcoef(share, weights)[0, 1] > 0.95 and share[-1] > 3 * share[0]


def test_a_draw_depends_on_seed_epoch_user_and_stretch_alone() -> None:
    times, given = np.arange(32) * 10, {"epoch": 3, "user": 7, "offset": 0}
    rule = dataclasses.replace(SHORT, alpha=1.2, seed=5)
    first = rule.choose(times, **given)
    assert np.array_equal(rule.choose(times, **given), first)
    others = [rule.choose(times, **given | {name: 11}) for name in given]
    others.append(dataclasses.replace(rule, seed=6).choose(times, **given))
    assert all(not np.array_equal(other, first) for other in others)


@pytest.mark.parametrize("alpha", [-1.0, 0.5, 1.0, 2.1])
def test_an_alpha_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"data.stochastic_length: .*: must be 0 \(off\), or above 1 and at most 2"):
        fixtures.config(data={"stochastic_length": alpha})


# --------------------------------------------------------------------------------- in a batch


RECIPES = [BatchSpec("early"), BatchSpec("late", history="positive"), BatchSpec("none", visibility="position")]


def both(recipe: BatchSpec, pieces: list[Piece], rule: StochasticLength = SHORT) -> tuple[HybridBatch, HybridBatch]:
    """The batch as it is and as it is shortened."""
    recipe = dataclasses.replace(recipe, negatives=4)
    data = fixtures.dataset()
    plain, short = (Collator(data, recipe, 0, True, None, shortening)(pieces, 0, 0) for shortening in (None, rule))
    return plain, short


def of_piece(batch: HybridBatch, number: int) -> slice:
    return slice(int(batch.seq_offsets[number]), int(batch.seq_offsets[number + 1]))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.fusion)
def test_exposures_and_targets_stay_and_see_what_is_left_of_their_history(recipe: BatchSpec) -> None:
    pieces = [p for p in fixtures.pieces("train") if p.item_ids.size > 25]
    rule = dataclasses.replace(SHORT, max_events=20)
    plain, short = both(recipe, pieces, rule)
    for name in ("target_items", "labels", "positions", "query_times", "target_query", "next_items", "history_lengths"):
        assert torch.equal(getattr(short, name), getattr(plain, name)), name
    assert plain.full_history_items is None and short.item_ids.numel() < plain.item_ids.numel()
    items, offsets = short.full_history
    assert torch.equal(items, plain.item_ids) and torch.equal(offsets, plain.seq_offsets)
    rows, owner = dict.fromkeys(range(len(pieces)), None), np.repeat(range(len(pieces)), plain.query_offsets.diff())
    for number, piece in enumerate(pieces):
        times = plain.timestamps[of_piece(plain, number)].numpy()
        chosen = rows[number] = rule.choose(times, epoch=0, user=piece.user_id, offset=piece.offset)
        for name in ("item_ids", "timestamps", "next_times"):
            whole, left = (getattr(batch, name)[of_piece(batch, number)] for batch in (plain, short))
            assert torch.equal(left, whole[torch.from_numpy(chosen)]), name
    for query, before in enumerate(plain.query_visible.tolist()):
        assert int(short.query_visible[query]) == sum(i < before for i in rows[owner[query]])
    ends = plain.seq_offsets[1:].numpy()
    for before, after in zip(plain.next_rows.tolist(), short.next_rows.tolist(), strict=True):
        number = int(np.searchsorted(ends, before, side="right"))
        within = before - int(plain.seq_offsets[number])
        assert after - int(short.seq_offsets[number]) == sum(i <= within for i in rows[number]) - 1 >= 0


def test_histories_that_are_short_enough_make_the_same_batch() -> None:
    plain, short = both(RECIPES[0], list(fixtures.pieces("train")[:6]), StochasticLength(1.9, 1024))
    for field in dataclasses.fields(HybridBatch):
        a, b = getattr(plain, field.name), getattr(short, field.name)
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(plain.features.values(), short.features.values())


def test_what_is_left_out_of_a_history_does_not_become_a_negative() -> None:
    cfg = fixtures.config(objective={"fusion": "none", "negatives": 40}, features={"item_id": True})
    model, data = fixtures.model(cfg), fixtures.dataset()
    pieces = [p for p in fixtures.pieces("train") if p.item_ids.size > 25][:3]
    rule = dataclasses.replace(SHORT, max_events=20)
    plain, short = (
        Collator(data, fixtures.recipe(cfg), 0, True, None, shortening)(pieces, 0, 0) for shortening in (None, rule)
    )
    with torch.no_grad():
        expected, found = model(plain).generative, model(short).generative
    assert short.item_ids.numel() < plain.item_ids.numel()
    assert expected is not None and found is not None
    assert found.effective_negatives == expected.effective_negatives and found.count == expected.count


def test_a_model_reads_what_is_left_as_if_there_were_nothing_else() -> None:
    """Early fusion: the logits of a shortened piece are those of a piece that never had the other events."""
    cfg = naive_model.config("early", weight=0.0)
    model, data, spec = fixtures.model(cfg), fixtures.dataset(), fixtures.recipe(cfg)
    spec = dataclasses.replace(spec, numeric_features=())
    model.features.numeric = None
    piece = next(p for p in fixtures.pieces("train") if p.item_ids.size > 25)
    piece = dataclasses.replace(piece, first_target=piece.item_ids.size - 1)
    rule = dataclasses.replace(SHORT, max_events=16)
    batch = Collator(data, spec, 0, True, None, rule)([piece], 0, 0)
    seen = int((piece.timestamps < piece.timestamps[-1]).sum())
    chosen = rule.choose(piece.timestamps[:seen], epoch=0, user=piece.user_id, offset=0)
    assert 0 < chosen.size < seen
    kept = np.append(chosen, piece.item_ids.size - 1)
    alone = dataclasses.replace(piece, first_target=chosen.size, **piece[kept].columns)
    with torch.no_grad():
        found, expected = model(batch).logits, model(Collator(data, spec)([alone], 0, 0)).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------- in the loader and in a run


def histories(loader: Loader, epoch: int, first_step: int = 0) -> dict[tuple[int, int], list[int]]:
    """(user, first exposure) -> what is read of the history."""
    found = {}
    for batch in loader.batches(epoch, first_step):
        owner = torch.repeat_interleave(batch.query_offsets.diff())[batch.target_query]
        for number, user in enumerate(batch.user_ids.tolist()):
            first = batch.positions[owner == number]
            found[user, int(first[0]) if first.numel() else -1] = batch.item_ids[of_piece(batch, number)].tolist()
    return found


def test_ranks_and_resumed_runs_read_the_same() -> None:
    def make(rank: int = 0, world: int = 1) -> Loader:
        collator = Collator(fixtures.dataset(), RECIPES[0], 0, True, None, dataclasses.replace(SHORT, max_events=20))
        sizes: dict[str, Any] = {"batch_users": 4 // world, "max_history": 20, "prefetch": 0, "shuffle": True}
        return Loader(fixtures.dataset(), collator, LoaderSpec("train", **sizes), rank, world)

    one = histories(make(), 1)
    assert histories(make(0, 2), 1) | histories(make(1, 2), 1) == one
    resumed = histories(make(), 1, first_step=2)
    assert resumed and all(one[key] == items for key, items in resumed.items())
    assert histories(make(), 2) != one


@pytest.mark.slow
def test_a_run_logs_the_share_that_it_reads_and_evaluates_whole_histories(tmp_path: Path) -> None:
    options = {
        "data__stochastic_length": 1.2,
        "objective__generative_weight": 0.5,
        "data__stochastic_choice": "uniform",
    }
    settings = config(tmp_path / "run", max_steps=3, **options)
    train(settings)
    kept = [line["history_kept"] for line in lines(tmp_path / "run", "step")]
    assert len(kept) == 3 and all(0.3 < share < 1 for share in kept)
    experiment = build_experiment(settings, init_distributed())
    for batch in experiment.loader("valid", 8).batches(0):
        assert batch.full_history_items is None
    plain = config(tmp_path / "plain", max_steps=1)
    train(plain)
    assert "history_kept" not in lines(tmp_path / "plain", "step")[0]
