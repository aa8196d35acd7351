"""Ids get rows of their own, keep them while steps read them, and share one per set otherwise: against a plain dict."""

from collections import Counter

import pytest
import torch
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from hllm_torchrec.modules.features.hash_tables import (
    WAYS,
    HashTable,
    SetAssociativeIds,
    hash_collection,
    start_vector,
)
from hllm_torchrec.modules.features.sum_pooling import SumPooledCollection

TABLE = HashTable(rows=1, evict_after=4)


def ids_of_sets(ids: SetAssociativeIds, sets: set[int], number: int) -> list[int]:
    """The first `number` ids, some of them negative and large, that hash to `sets`."""
    tried = torch.arange(-(2**62), -(2**62) + 400_000)
    found = ids._set_of(ids._hashed(tried))
    return tried[torch.isin(found, torch.tensor(sorted(sets)))][:number].tolist()


class Naive:
    """What the module's docstring says, one id at a time."""

    def __init__(self, table: HashTable) -> None:
        self.table, self.step = table, 0
        self.rows: dict[int, tuple[int, int]] = {}
        """Row -> (hash, step that last read it)."""
        self.evicted = 0

    def row(self, hashed: int, set_number: int) -> int:
        first = WAYS * set_number
        own = [row for row, (known, _) in self.rows.items() if known == hashed]
        return own[0] if own else first + WAYS - 1

    def read(self, step_ids: list[tuple[int, int]]) -> set[int]:
        """One step of (hash, set); returns the rows that begin anew."""
        self.step += 1
        counts = Counter(step_ids)
        known = {hashed for hashed, _ in self.rows.values()}
        for row, (hashed, _) in list(self.rows.items()):
            if hashed in {one for one, _ in counts}:
                self.rows[row] = (hashed, self.step)
        began = set()
        for (hashed, number), _ in sorted(counts.items(), key=lambda one: (-one[1], one[0][0])):
            if hashed in known:
                continue
            ways = range(WAYS * number, WAYS * number + WAYS - 1)
            read = {row: self.rows[row][1] if row in self.rows else -1 for row in ways}
            free = [row for row in ways if read[row] <= self.step - self.table.evict_after or row not in self.rows]
            if free:
                row = min(free, key=lambda one: (read[one], one))
                self.evicted += row in self.rows
                self.rows[row] = (hashed, self.step)
                began.add(row)
        return began


def test_rows_are_given_and_taken_as_by_a_dict() -> None:
    ids, naive, generator = (
        SetAssociativeIds(TABLE, torch.device("cpu")),
        Naive(TABLE),
        torch.Generator().manual_seed(0),
    )
    known = torch.tensor(ids_of_sets(ids, {0, 7, 959}, 90))
    collided = 0
    for step in range(30):
        recent = known[torch.randint(0, 90, (40 if step % 5 else 2,), generator=generator)]
        hashed = ids._hashed(recent)
        pairs = list(zip(hashed.tolist(), ids._set_of(hashed).tolist()))
        began = naive.read(pairs)
        found = ids({"x": JaggedTensor(recent, lengths=torch.tensor([recent.numel()]))})["x"].values()
        assert found.tolist() == [naive.row(*pair) for pair in pairs], step
        rows = ids.evict()
        assert (set() if rows is None else set(rows.tolist())) == began and ids.evict() is None
        collided += sum(row % WAYS == WAYS - 1 for row in found.tolist())
    counts = ids.take_counts()
    assert counts.evicted == naive.evicted > 5 and counts.filled == len(naive.rows) == counts.admitted - naive.evicted
    assert counts.collided == collided > 5 and counts.lookups > 500
    assert ids.take_counts().lookups == 0


def test_evaluation_changes_nothing() -> None:
    ids = SetAssociativeIds(TABLE, torch.device("cpu"))
    one = {"x": JaggedTensor(torch.tensor([5, 6]), lengths=torch.tensor([2]))}
    rows = ids(one)["x"].values()
    state = {name: value.clone() for name, value in ids.state_dict().items()}
    ids.eval()
    other = ids({"x": JaggedTensor(torch.tensor([5, 6, 7]), lengths=torch.tensor([3]))})["x"].values()
    assert other[:2].tolist() == rows.tolist() and other[2] % WAYS == WAYS - 1
    assert all(torch.equal(value, state[name]) for name, value in ids.state_dict().items())


def test_hashes_are_spread_and_distinct() -> None:
    ids = SetAssociativeIds(HashTable(10**6, 1), torch.device("cpu"))
    hashed = ids._hashed(torch.arange(200_000))
    assert hashed.unique().numel() == 200_000 and 0 <= hashed.min() <= hashed.max() < ids.input_size()
    in_sets = torch.bincount(ids._set_of(hashed), minlength=ids.table.sets).float()
    assert in_sets.numel() == ids.table.sets == 63_360 and abs(in_sets.var() / in_sets.mean() - 1) < 0.05  # Poisson


@pytest.mark.parametrize(("rows", "sets"), [(1, 960), (15_360, 960), (15_361, 1920), (10**8, 6_250_560)])
def test_rows_are_rounded_up_to_whole_sets(rows: int, sets: int) -> None:
    assert HashTable(rows, 1).sets == sets
    assert HashTable(rows, 1).sets * SetAssociativeIds(HashTable(1, 1), torch.device("cpu"))._span < 2**63


def test_shards_hold_whole_sets() -> None:
    ids = SetAssociativeIds(TABLE, torch.device("cpu"))
    half = ids.rebuild_with_output_id_range((7680, 15_360), [0, 7680, 15_360])
    assert half.rows == half.output_size() == 7680 and half.input_size() == ids.input_size()
    with pytest.raises(ValueError, match="7 ranks: must divide the 960 sets of a table of kind hash"):
        ids.rebuild_with_output_id_range((0, 2208), [0, 2208, 4416, 6624, 8832, 11_040, 13_248, 15_360])


def test_bags_are_sums_of_rows_that_begin_alike() -> None:
    tables = SumPooledCollection(hash_collection({"a": TABLE, "b": TABLE}, 4, 0.5, None))
    features = KeyedJaggedTensor(
        ["b", "other", "a"], torch.tensor([9, 9, 3, 1, 2, 3]), lengths=torch.tensor([2, 0, 1, 0, 0, 3])
    )
    pooled = tables(features).to_dict()
    assert pooled.keys() == {"a", "b"}
    torch.testing.assert_close(pooled["a"], torch.stack([torch.zeros(4), 3 * start_vector("a", 4, 0.5)]))
    torch.testing.assert_close(pooled["b"], torch.stack([2 * start_vector("b", 4, 0.5), torch.zeros(4)]))
    pooled["a"].sum().backward()
    weight = tables.collection._embedding_collection.embeddings["a"].weight
    assert int((weight.grad.abs().sum(1) > 0).sum()) == 3


@pytest.mark.parametrize(("filled", "without"), [(0.5, 0.002), (0.7, 0.022), (0.9, 0.085)])
def test_few_ids_of_a_table_that_is_not_full_have_no_row_of_their_own(filled: float, without: float) -> None:
    """The shares that docs/retrieval.md states."""
    ids = SetAssociativeIds(HashTable(1, 10**9), torch.device("cpu"))
    known = torch.arange(int(ids.rows * filled))
    for part in known.split(4096):
        ids({"x": JaggedTensor(part, lengths=torch.tensor([part.numel()]))})
    assert 1 - ids.take_counts().filled / known.numel() == pytest.approx(without, abs=0.006)
