"""Incremental embedding job for users: embeds users with new events on all ranks and commits them to the store.

The content hash of a user in the store is a hash of the last event's second and the number of events. A job that is
repeated, or restarted after a crash, embeds only users with new events.
"""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.data.dataset import Dataset, RowGroup
from hllm_torchrec.data.events import Piece
from hllm_torchrec.distributed import coordination
from hllm_torchrec.evaluation.run_loader import LoadedRun
from hllm_torchrec.inference import item_embedding
from hllm_torchrec.inference.item_embedding import NewRows, open_or_create_store, rank_chunks, write_rounds
from hllm_torchrec.inference.user_embedder import nightly_request, open_embedder
from hllm_torchrec.store.keys import Hashes, KeyKind, hash_numbers, raw_keys
from hllm_torchrec.store.store import EmbeddingStore


@dataclass(frozen=True)
class UserReport:
    """Result of a job. users: number of users with an event in the dataset; active: number of these users with an event
    from `since` on; encoded: number of active users read by this job (some may have no vector: `embed_users`)."""

    users: int
    active: int
    encoded: int
    version: int
    seconds: float


@dataclass(frozen=True)
class _Group:
    """The users of a row group who are not in a later part: their rows, numbers of events, whether they are active,
    content hashes, and whether they must be embedded."""

    group: RowGroup
    rows: Ints
    lengths: Ints
    active: NDArray[np.bool_]
    marks: Hashes
    todo: NDArray[np.bool_]

    def cost(self, max_history: int) -> int:
        """Number of events that are read to embed the users of the group."""
        return int(np.minimum(self.lengths[self.todo], max_history).sum())


def user_facts(loaded: LoadedRun) -> dict[str, Any]:
    """Facts that determine user embeddings, except the histories: checkpoint, fusion and maximum history length."""
    config = loaded.experiment.config
    return {
        "part": "users",
        "weights": loaded.fingerprint,
        "fusion": config.objective.fusion,
        "max_history": config.data.max_history,
    }


def embed_users(
    loaded: LoadedRun, path: Path, *, since: int = 0, dtype: str = "fp16", keys: KeyKind | None = None
) -> UserReport:
    """Update the user store at `path` (created if missing) to the dataset. Collective.

    A vector is computed from the latest `max_history` - 1 events of the user, at the first midnight (UTC) at which all
    of them are visible. Must be called within `loaded.weights`. Users who have events but no history under the
    configuration (`data.history: positive`) get no vector.

    Args:
        since: second UTC; users without an event at or after it are not updated.
        keys: type of the keys, which are raw user ids: "string" or "int64"; None: that of the store ("string" for a
            new one).

    Raises:
        ValueError: the store was made by a different checkpoint, another process is writing to it, or `keys` is "int64"
            and raw ids are not numbers.
    """
    experiment = loaded.experiment
    dataset, limit = experiment.dataset, experiment.config.data.max_history
    raw_keys(dataset.users["raw_user_id"], keys or "string")  # raises for invalid ids before a store is created
    store = open_or_create_store(path, experiment.hllm.user_vector_width, dtype, user_facts(loaded), keys)
    started = time.perf_counter()
    groups, delay = _index(dataset, store, since), experiment.config.data.feedback_delay
    windows = _windows(groups, item_embedding.COMMIT_TOKENS * coordination.world_size(), limit)
    version = store.snapshot().version
    # Opening an embedder encodes the catalogue, so skip it if there are no users to embed. All ranks index the complete
    # dataset, so they take the same branch.
    with open_embedder(experiment) if windows else nullcontext() as embedder:

        def encode(chunk: tuple[list[Piece], Hashes]) -> NewRows:
            pieces, marks = chunk
            assert embedder is not None
            vectors, known = embedder(pieces)
            rows = np.flatnonzero(known.cpu().numpy())
            users = np.array([pieces[row].user_id for row in rows], np.int64)
            return user_keys(dataset, users, store.kind), vectors.cpu()[rows], marks[rows]

        rounds = (one for window in windows for one in _rounds(window, dataset, limit, delay))
        if windows:
            version = write_rounds(store, rounds, encode, "embed users", len(windows))
    counts = [(len(g.rows), int(g.active.sum()), int(g.todo.sum())) for g in groups]
    users, active, encoded = np.array([(0, 0, 0), *counts]).sum(0).tolist()
    return UserReport(users, active, encoded, version, time.perf_counter() - started)


def user_keys(dataset: Dataset, user_ids: Ints, kind: KeyKind) -> pa.Array:
    """Keys of users [n] in a store with keys of type `kind`."""
    return raw_keys(dataset.users["raw_user_id"].take(pa.array(user_ids - 1)), kind)


def user_content_hashes(last_seconds: Ints, lengths: Ints) -> Hashes:
    """Hash of each user's last second and number of events: uint64 [n]."""
    return hash_numbers(last_seconds, lengths)


def _index(dataset: Dataset, store: EmbeddingStore, since: int) -> list[_Group]:
    """Index each user once, in the latest part with the user, because the row there has the complete history."""
    seen, snapshot = np.zeros(dataset.num_users, bool), store.snapshot()
    found = []
    for part in ("test", "valid", "train"):  # latest first: later sequences include the events of earlier parts
        groups = dataset.row_groups(part)
        for group in groups:
            heads = dataset.heads(group)
            users, lengths = heads.user_ids, heads.lengths
            rows = np.flatnonzero(~seen[users])
            # The last event of each row; each row has at least one event.
            ends = dataset.tails(group, lengths - 1, ["user_id", "timestamps"])
            last = ends.timestamps[ends.offsets[1:] - 1][rows]
            marks = user_content_hashes(last, lengths[rows])
            stored, known = snapshot.content_hashes(user_keys(dataset, users[rows], store.kind))
            active = last >= since
            todo = active & (~known | (stored != marks))
            found.append(_Group(group, rows, lengths[rows], active, marks, todo))
            seen[users] = True
    return found


def _windows(groups: list[_Group], budget: int, max_history: int) -> list[list[_Group]]:
    """Windows of row groups with users to embed; a window has about `budget` events."""
    windows: list[list[_Group]] = []
    spent = budget
    for group in groups:
        if not group.todo.any():
            continue
        if spent >= budget:
            windows.append([])
            spent = 0
        windows[-1].append(group)
        spent += group.cost(max_history)
    return windows


def _rounds(
    window: list[_Group], dataset: Dataset, max_history: int, delay: int
) -> Iterator[list[tuple[list[Piece], Hashes]]]:
    """Yield this rank's rounds of a window; a round is a list of chunks (requests, content hashes)."""
    requests: list[Piece] = []
    for one in window:
        chosen, lengths = one.rows[one.todo], one.lengths[one.todo]
        start = np.maximum(0, lengths - max_history)
        skipped = dataset.heads(one.group).lengths  # skip all events of users who are not embedded
        skipped[chosen] = start
        rows = dataset.tails(one.group, skipped)
        pieces = (
            rows.cut(*at)
            for at in zip(chosen.tolist(), start.tolist(), lengths.tolist(), lengths.tolist(), strict=True)
        )
        requests += [nightly_request(piece, len(piece), max_history, delay) for piece in pieces]
    marks = np.concatenate([one.marks[one.todo] for one in window])
    costs = np.array([len(piece) for piece in requests], np.int64)
    for chunks in rank_chunks(np.arange(len(requests)), costs):
        yield [([requests[i] for i in chunk], marks[chunk]) for chunk in chunks]
