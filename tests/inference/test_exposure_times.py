"""A request's vector is that of the user's latest exposure at or before it, and of nothing later."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hllm_torchrec.data.split import SPLITS
from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.inference.exposure_store import exposure_content_hashes, exposure_keys
from hllm_torchrec.inference.exposure_times import AsOfLookup
from hllm_torchrec.store import EmbeddingStore
from tests.helpers import fixtures


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def exposures() -> list[tuple[int, int, int, int]]:
    """(user, position, item, second) of every exposure of the shop."""
    return [
        (piece.user_id, piece.offset + at, int(piece.item_ids[at]), int(piece.timestamps[at]))
        for part in SPLITS
        for piece in fixtures.pieces(part)
        for at in piece.exposures.tolist()
    ]


def make_store(path: Path, left_out: int) -> dict[tuple[int, int], torch.Tensor]:
    """A store of all exposures but every `left_out`-th; (user, position) -> vector."""
    rows = [row for number, row in enumerate(exposures()) if number % left_out]
    users, positions, items, seconds = (np.array(column) for column in zip(*rows))
    vectors = torch.randn(len(rows), 3)
    store = EmbeddingStore.create(path, 3, "fp32", "int64", {"part": "exposures", "mode": "nearline"})
    with store.writer() as writer:
        writer.upsert(exposure_keys(users, positions), vectors, exposure_content_hashes(items, seconds))
        writer.commit()
    return {row[:2]: vector for row, vector in zip(rows, vectors)}


def test_requests_at_before_and_between_exposures(tmp_path: Path) -> None:
    stored, dataset = make_store(tmp_path / "s", 7), fixtures.dataset()
    raw, rng = dataset.users["raw_user_id"].to_pylist(), np.random.default_rng(0)
    every = exposures()
    requests = [(row[0], row[3] + int(rng.choice([-1, 0, 0, 1, 5000]))) for row in every]
    requests += [(user, second) for user in (1, 5, 24) for second in (0, 1, 2**40)]
    found = AsOfLookup(tmp_path / "s", dataset)([raw[user - 1] for user, _ in requests], np.array(requests)[:, 1])
    kinds = set()
    for (user, second), row in zip(requests, found):
        earlier = [one for one in every if one[0] == user and one[3] <= second]
        latest = max(earlier, key=lambda one: one[1], default=None)
        vector = None if latest is None else stored.get(latest[:2])
        expected = torch.tensor([0.0, 0, 0, 1]) if vector is None else torch.cat([vector, torch.zeros(1)])
        assert torch.equal(row, expected)
        kinds.add((latest is None, vector is None))
    assert kinds == {(True, True), (False, True), (False, False)}


def test_unknown_users_have_none_and_other_sequences_are_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 1000)
    lookup = AsOfLookup(tmp_path / "s", fixtures.dataset())
    assert lookup(["nobody"], np.array([2**33])).tolist() == [[0, 0, 0, 1]] and lookup([], np.array([])).shape == (0, 4)
    user, position, _, second = exposures()[1]
    store = EmbeddingStore.open(tmp_path / "s")
    with store.writer() as writer:
        writer.upsert(exposure_keys(np.array([user]), np.array([position])), torch.ones(1, 3))
        writer.commit()
    raw = fixtures.dataset().users["raw_user_id"][user - 1].as_py()
    with pytest.raises(ValueError, match=f"event {position} of user {user} has another item or second"):
        AsOfLookup(tmp_path / "s", fixtures.dataset())([raw], np.array([second]))
