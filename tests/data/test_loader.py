"""The loader: every exposure once, the same number of steps on every rank, and a thread that never stays."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hllm_torchrec.data import loader as loader_module
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.batch_spec import BatchSpec
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.dataset import Dataset, RowGroup
from hllm_torchrec.data.jagged_arrays import offsets_from_lengths
from hllm_torchrec.data.loader import WINDOW_ROW_GROUPS, Loader, LoaderSpec
from hllm_torchrec.data.pieces import (
    assign_balanced,
    cut_into_pieces,
    in_user_sample,
    pieces_of_requests,
    window_start,
)
from tests.helpers import fixtures

RECIPE = BatchSpec(fusion="late", negatives=4)


def make(split: str = "train", dataset: Dataset | None = None, **options: Any) -> Loader:
    data = dataset or fixtures.dataset()
    chosen: dict[str, Any] = {"batch_users": 3, "max_history": 20, "shuffle": True, "seed": 1} | options
    place = {name: chosen.pop(name) for name in ("rank", "world_size") if name in chosen}
    collator = Collator(data, RECIPE, seed=1, training=chosen["shuffle"])
    return Loader(data, collator, LoaderSpec(split, **chosen), **place)


def loaders(world: int, **options: Any) -> list[Loader]:
    return [make(rank=rank, world_size=world, **options) for rank in range(world)]


@pytest.fixture(params=["shared", "sharded"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "sharded":
        monkeypatch.setattr(loader_module, "SHARED_EVENTS", 10)
    return str(request.param)


def exposures(batch: HybridBatch) -> list[tuple[int, int]]:
    """(user, position) of each exposure of a batch."""
    piece = torch.repeat_interleave(torch.arange(batch.user_ids.numel()), batch.query_offsets.diff())
    users = batch.user_ids[piece[batch.target_query]]
    return list(zip(users.tolist(), batch.positions.tolist(), strict=True))


def expected_exposures(split: str) -> list[tuple[int, int]]:
    found = []
    for piece in fixtures.pieces(split):
        targets = np.flatnonzero(~np.isnan(piece.labels[piece.first_target :])) + piece.first_target
        found += [(piece.user_id, int(target)) for target in targets]
    return sorted(found)


def users_of(loader: Loader) -> set[int]:
    """The users of an epoch."""
    return {user for batch in loader.batches(0) for user in batch.user_ids.tolist()}


def signature(batch: HybridBatch) -> list[list[float]]:
    """Everything that says which samples a batch has, in order."""
    parts = (batch.user_ids, batch.item_ids, batch.target_items, batch.labels, batch.positions)
    return [part.tolist() for part in (*parts, batch.negative_items, batch.features.values())]


# --- every sample once -----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_every_exposure_comes_once_an_epoch(world: int, split: str, mode: str) -> None:
    ranks = loaders(world, split=split)
    assert all(one.sharded == (mode == "sharded") for one in ranks)
    for epoch in range(2):
        seen = [pair for one in ranks for batch in one.batches(epoch) for pair in exposures(batch)]
        assert sorted(seen) == expected_exposures(split)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_have_the_same_number_of_steps(world: int, mode: str) -> None:
    ranks = loaders(world)
    for epoch in range(3):
        (steps,) = {one.steps(epoch) for one in ranks}
        batches = [list(one.batches(epoch)) for one in ranks]
        assert [len(of_rank) for of_rank in batches] == [steps] * world
        assert all(batch.user_ids.numel() <= 3 for of_rank in batches for batch in of_rank)
        for step in range(steps):  # the negative pool of a step is the same on every rank
            pools = {tuple(of_rank[step].negative_items.tolist()) for of_rank in batches}
            assert len(pools) == 1


def test_a_rank_without_users_gets_empty_batches_that_hold_the_negatives() -> None:
    ranks = loaders(5, split="test", batch_users=1)
    sizes = [batch.user_ids.numel() for one in ranks for batch in one.batches(0)]
    assert 0 in sizes and sum(sizes) == len(ranks[0].pieces)
    empty = next(b for one in ranks for b in one.batches(0) if b.user_ids.numel() == 0)
    assert empty.num_exposures == 0 and empty.features.stride() == 0
    assert empty.seq_offsets.tolist() == [0] and empty.query_offsets.tolist() == [0]
    assert empty.unique_items.tolist() == sorted(empty.negative_items.tolist())


def test_exposures_since_a_moment_come_once_with_their_whole_history(mode: str) -> None:
    every = [
        (piece.timestamps[at], piece.user_id, at)
        for piece in fixtures.pieces()
        for at in np.flatnonzero(~np.isnan(piece.labels)).tolist()
    ]
    since = int(np.median([second for second, _, _ in every]))
    ranks = loaders(2, since=since, max_history=1000)
    batches = [batch for one in ranks for batch in one.batches(0)]
    found = sorted(pair for batch in batches for pair in exposures(batch))
    assert found == sorted((user, at) for second, user, at in every if second >= since) and 0 < len(found) < len(every)
    whole = {
        pair: batch for one in loaders(1, max_history=1000) for batch in one.batches(0) for pair in exposures(batch)
    }
    for batch in batches:
        lengths = dict(zip(exposures(batch), batch.history_lengths.tolist(), strict=True))
        for pair in lengths:
            other = dict(zip(exposures(whole[pair]), whole[pair].history_lengths.tolist(), strict=True))
            assert lengths[pair] == other[pair]


def test_a_moment_without_later_events_is_refused() -> None:
    with pytest.raises(ValueError, match=r"split .train. has no event since 2065-01-24T05:20:00Z"):
        make(since=3_000_000_000)


# --- order -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
def test_the_shuffle_is_a_function_of_seed_and_epoch(world: int, mode: str) -> None:
    def order(epoch: int, **options: Any) -> list[list[list[float]]]:
        return [signature(batch) for batch in make(world_size=world, **options).batches(epoch)]

    assert order(0) == order(0)
    one = make(world_size=world)
    list(one.batches(3))  # what was read before does not matter
    assert [signature(batch) for batch in one.batches(0)] == order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, seed=2)


def test_without_shuffle_batches_come_in_the_order_of_the_file(mode: str) -> None:
    options = {"shuffle": False, "max_history": 500}  # one piece a user
    users = [user for b in make(**options).batches(0) for user in sorted(b.user_ids.tolist())]
    assert users == [piece.user_id for piece in fixtures.pieces("train")]


def test_one_and_two_ranks_have_the_same_global_batches() -> None:
    single = list(make(batch_users=4).batches(1))
    pair = [list(one.batches(1)) for one in loaders(2, batch_users=2)]
    assert len(single) == len(pair[0]) == len(pair[1])
    for whole, *halves in zip(single, *pair, strict=True):
        assert sorted(exposures(whole)) == sorted(pair for half in halves for pair in exposures(half))
        assert all(half.user_ids.numel() <= 2 for half in halves)
        assert whole.negative_items.tolist() == halves[0].negative_items.tolist()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_resuming_at_a_step_gives_the_remaining_batches(world: int, prefetch: int, mode: str) -> None:
    whole = [signature(batch) for batch in make(world_size=world, prefetch=prefetch).batches(2)]
    for step in (1, len(whole) - 1, len(whole)):
        rest = make(world_size=world, prefetch=prefetch).batches(2, first_step=step)
        assert [signature(batch) for batch in rest] == whole[step:]


# --- pieces ----------------------------------------------------------------------------------------------

ROWS = st.lists(
    st.integers(1, 60).flatmap(lambda length: st.tuples(st.just(length), st.integers(0, length - 1))),
    min_size=1,
    max_size=8,
)


@given(rows=ROWS, max_history=st.integers(2, 25))
def test_pieces_cover_every_exposure_once_and_see_enough(rows: list[tuple[int, int]], max_history: int) -> None:
    lengths, starts = np.array(rows, dtype=np.int64).T
    number = np.arange(len(rows))
    pieces = cut_into_pieces(number // 3, number % 3, lengths, starts, max_history)
    covered: dict[int, list[int]] = {row: [] for row in range(len(rows))}
    for group, row, start, first, end in zip(
        pieces.group, pieces.row, pieces.start, pieces.first_target, pieces.end, strict=True
    ):
        assert 0 <= start <= first < end <= start + max_history
        for exposure in range(first, end):
            assert exposure - start >= min(exposure, max_history // 2)
        covered[3 * group + row] += range(first, end)
    for row, (length, target_start) in enumerate(rows):
        assert covered[row] == list(range(target_start, length))
    assert (pieces.lengths == pieces.end - pieces.start).all()


def test_a_user_who_fits_is_one_piece_with_the_whole_history() -> None:
    pieces = cut_into_pieces(np.zeros(1, int), np.zeros(1, int), np.array([20]), np.array([15]), 20)
    assert (pieces.start.tolist(), pieces.first_target.tolist(), pieces.end.tolist()) == ([0], [15], [20])


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=40), min_size=1, max_size=4),
    st.integers(2, 9),
    st.integers(0, 4),
    st.data(),
)
def test_pieces_of_requests_begin_where_each_exposure_of_theirs_does(
    gaps: list[list[int]], max_history: int, delay: int, data: st.DataObject
) -> None:
    times = [np.cumsum(row) // 4 for row in gaps]
    starts = np.array([data.draw(st.integers(0, len(row) - 1)) for row in gaps])
    every, offsets = np.arange(len(gaps)), offsets_from_lengths([len(row) for row in gaps])
    seen = np.concatenate([np.searchsorted(row, row - delay) for row in times])
    found = pieces_of_requests(every * 0, every, starts, seen, offsets, max_history)
    covered = []
    for row, start, first, end in zip(found.row, found.start, found.first_target, found.end, strict=True):
        assert start <= first < end <= first + max_history
        covered += [(row, position) for position in range(first, end)]
        for position in range(first, end):
            visible = sum(time < times[row][position] - delay for time in times[row])
            assert start == window_start(visible, max_history) and visible - start < max_history
    assert covered == [(row, position) for row in every for position in range(starts[row], len(gaps[row]))]


def test_positions_and_history_lengths_count_from_the_start_of_the_whole_sequence() -> None:
    short = {pair: n for batch in make(max_history=6).batches(0) for pair, n in _history(batch)}
    whole = {pair: n for batch in make(max_history=500).batches(0) for pair, n in _history(batch)}
    assert short.keys() == whole.keys()
    times = {piece.user_id: piece.timestamps for piece in fixtures.pieces("train")}
    for (user, position), length in whole.items():
        assert length == np.searchsorted(times[user], times[user][position])


def _history(batch: HybridBatch) -> list[tuple[tuple[int, int], int]]:
    return list(zip(exposures(batch), batch.history_lengths.tolist(), strict=True))


# --- sharing out -----------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=60),
    hands=st.integers(1, 8),
)
def test_deal_shares_pieces_and_work_out_evenly(lengths: list[int], hands: int) -> None:
    sizes = np.array(lengths)
    most = -(-sizes.size // hands)
    capped = assign_balanced(np.arange(sizes.size), sizes, hands, most)
    assert sorted(np.concatenate(capped).tolist()) == list(range(sizes.size))
    assert max(share.size for share in capped) <= most
    shares = assign_balanced(np.arange(sizes.size), sizes, hands, sizes.size)
    assert sorted(np.concatenate(shares).tolist()) == list(range(sizes.size))
    assert all(share.size for share in shares) or sizes.size < hands
    loads = [int(sizes[share].sum()) for share in shares]
    assert max(loads) - min(loads) <= sizes.max()


# --- batches of so much cost -----------------------------------------------------------------------------


@pytest.fixture
def item_costs() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 30, fixtures.dataset().num_items)


def cost_of(loader: Loader, step: int, item_costs: np.ndarray) -> int:
    """What the pieces of a step of this rank cost, summed event by event."""
    return sum(int(item_costs[loader._piece(int(i)).item_ids].sum()) for i in loader.rank_batches(0)[loader.rank][step])


@pytest.mark.parametrize("world", [1, 2])
def test_steps_of_a_cost_never_exceed_it_and_are_filled(world: int, item_costs: np.ndarray) -> None:
    budget = 900
    ranks = loaders(world, batch_cost=budget, item_costs=item_costs)
    dearest = int(ranks[0].costs.max())
    assert dearest < budget
    steps = ranks[0].steps(0)
    together = [sum(cost_of(loader, step, item_costs) for loader in ranks) for step in range(steps)]
    assert all(cost <= budget * world for cost in together)
    assert all(cost + dearest > budget * world for cost in together[:-1])  # another piece would not have fitted
    for step in range(steps):
        shares = [cost_of(loader, step, item_costs) for loader in ranks]
        assert max(shares) - min(shares) <= dearest


def test_batches_of_a_cost_hold_every_exposure_once_on_as_many_steps_per_rank(
    mode: str, item_costs: np.ndarray
) -> None:
    ranks = loaders(2, batch_cost=500, item_costs=item_costs)
    batches = [list(loader.batches(1)) for loader in ranks]
    assert len(batches[0]) == len(batches[1]) == ranks[0].steps(1)
    found = [exposure for of_rank in batches for batch in of_rank for exposure in exposures(batch)]
    assert sorted(found) == expected_exposures("train")


def test_a_piece_above_the_cost_is_a_step_of_its_own(item_costs: np.ndarray) -> None:
    loader = make(batch_cost=1, item_costs=item_costs)
    assert loader.steps(0) == len(loader.pieces)


# --- memory and errors -----------------------------------------------------------------------------------


def test_shared_mode_reads_each_row_group_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = _count_reads(monkeypatch)
    one = make()
    del reads[:]
    list(one.batches(0))
    list(one.batches(1))
    assert len(reads) == len(set(reads)) == 24


@pytest.mark.parametrize("world", [1, 2])
def test_sharded_mode_holds_a_window_and_reads_each_row_group_once_an_epoch(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "SHARED_EVENTS", 10)
    reads = _count_reads(monkeypatch)
    ranks = loaders(world)
    del reads[:]
    for one in ranks:
        for _ in one.batches(0):
            assert len(one._rows._cached) <= WINDOW_ROW_GROUPS
    assert len(reads) == len(set(reads)) == 24


def _count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the row groups that are really read."""
    reads: list[int] = []
    read = Dataset.read_row_group

    def counted(self: Dataset, path: Any, index: int, columns: Any = None) -> Any:
        reads.append(index)
        return read(self, path, index, columns)

    monkeypatch.setattr(Dataset, "read_row_group", counted)
    return reads


class _Unprepared(Dataset):
    """A dataset whose split has no file."""

    def row_groups(self, part: str, since: int | None = None) -> list[RowGroup]:
        return []


def test_a_share_of_users_holds_the_smaller_shares_and_no_other_exposure() -> None:
    everyone = users_of(make())
    half, quarter = users_of(make(user_share=0.5)), users_of(make(user_share=0.25))
    assert quarter < half < everyone
    found = [pair for batch in make(user_share=0.5).batches(0) for pair in exposures(batch)]
    assert sorted(found) == [pair for pair in expected_exposures("train") if pair[0] in half]


def test_a_share_of_many_users_is_as_large_as_it_says() -> None:
    chosen = in_user_sample(np.arange(100_000), 0.3)
    assert abs(chosen.mean() - 0.3) < 0.01
    assert in_user_sample(np.arange(100_000), 1.0).all()


def test_a_share_without_a_user_is_an_error() -> None:
    with pytest.raises(ValueError, match="split 'train': no user is in a share of 1e-09: raise the share"):
        make(user_share=1e-9)


def test_an_empty_split_is_an_error() -> None:
    data = _Unprepared(fixtures.dataset().root, fixtures.dataset().manifest)
    with pytest.raises(ValueError, match=r"split 'valid' is empty: prepare the dataset with another split rule"):
        make("valid", dataset=data)


@pytest.fixture
def no_thread_stays() -> Iterator[None]:
    yield
    left = [thread for thread in threading.enumerate() if thread.name == "hllm-loader"]
    for thread in left:  # one that was given up ends once its disk answers
        thread.join(5)
    assert not [thread for thread in left if thread.is_alive()]


class _Broken(Collator):
    """Fails at its third batch."""

    def __call__(self, pieces: Any, epoch: int, step: int, rank: int = 0) -> HybridBatch:
        if step == 2:
            raise ValueError("row 7 is bad")
        return super().__call__(pieces, epoch, step, rank)


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_an_error_in_the_background_surfaces_in_its_place(prefetch: int, no_thread_stays: None) -> None:
    data = fixtures.dataset()
    one = Loader(data, _Broken(data, RECIPE), LoaderSpec("train", batch_users=3, max_history=20, prefetch=prefetch))
    batches = one.batches(0)
    next(batches), next(batches)
    with pytest.raises(ValueError, match="row 7 is bad"):
        next(batches)


@pytest.mark.parametrize("prefetch", [1, 4])
def test_a_thread_that_is_ended_does_not_end_the_epoch_as_if_all_were_well(
    prefetch: int, no_thread_stays: None
) -> None:
    class Leaving(Collator):
        def __call__(self, pieces: Any, epoch: int, step: int, rank: int = 0) -> HybridBatch:
            if step == 1:
                raise SystemExit(0)
            return super().__call__(pieces, epoch, step, rank)

    data = fixtures.dataset()
    batches = Loader(data, Leaving(data, RECIPE), LoaderSpec("train", 3, 20, prefetch=prefetch)).batches(0)
    next(batches)
    with pytest.raises(RuntimeError, match=r"rank 0 of 1, epoch 0 from step 0 on: the thread .* SystemExit\(0\)"):
        next(batches)


def test_a_reader_that_does_not_answer_is_given_up(no_thread_stays: None) -> None:
    answer = threading.Event()

    class Stuck(Collator):
        def __call__(self, pieces: Any, epoch: int, step: int, rank: int = 0) -> HybridBatch:
            if step == 3:
                answer.wait(20)
            return super().__call__(pieces, epoch, step, rank)

    data = fixtures.dataset()
    one = Loader(data, Stuck(data, RECIPE), LoaderSpec("train", 3, 20, timeout=0.5), rank=1, world_size=2)
    batches = one.batches(4, first_step=2)
    next(batches)
    threading.Timer(2, answer.set).start()  # the loader waits for its thread, up to 5 s, before it raises
    with pytest.raises(
        TimeoutError,
        match=r"rank 1 of 2, epoch 4 from step 2 on: no batch for 0\.5 s \(batches before: 1\)",
    ):
        next(batches)


def test_leaving_early_stops_the_thread(no_thread_stays: None) -> None:
    batches = make(prefetch=2).batches(0)
    next(batches)
    assert [thread for thread in threading.enumerate() if thread.name == "hllm-loader"]
    batches.close()


def test_an_epoch_to_its_end_stops_the_thread(no_thread_stays: None) -> None:
    for _ in make(prefetch=2).batches(0):
        pass


def test_batches_are_prepared_ahead_but_no_further() -> None:
    made: list[int] = []

    class Counting(Collator):
        def __call__(self, pieces: Any, epoch: int, step: int, rank: int = 0) -> HybridBatch:
            made.append(step)
            return super().__call__(pieces, epoch, step, rank)

    data = fixtures.dataset()
    one = Loader(data, Counting(data, RECIPE), LoaderSpec("train", batch_users=3, max_history=20, prefetch=2))
    batches = one.batches(0)
    next(batches)
    for _ in range(200):  # the one taken, two in the queue, one in hand
        if len(made) == 4:
            break
        threading.Event().wait(0.01)
    threading.Event().wait(0.15)
    assert made == [0, 1, 2, 3]
    batches.close()
