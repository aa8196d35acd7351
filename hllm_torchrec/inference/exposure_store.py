"""Stage III stores: user vectors of exposures, and item vectors as inputs of the user encoder.

    embed_exposures(loaded, Path("stores/nearline"), "nearline")      # user vectors at the time of each exposure
    embed_item_features(loaded, Path("stores/item-features"))         # P(E) + ID + item features, by raw id

The key of an exposure is its user and its position in the user's complete sequence, which does not depend on how the
sequence is split into parts. The content hash is a hash of the exposure's item and second, with which a reader detects
that the store was made from different sequences.

Legend: n exposures, D width of a user vector.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.data.split import SPLITS
from hllm_torchrec.distributed.collectives import global_sum
from hllm_torchrec.evaluation.catalogue_retrieval import vectors_by_features
from hllm_torchrec.evaluation.run_loader import LoadedRun
from hllm_torchrec.inference.exposure_vectors import Coverage, ExposureVectors, Mode, exposure_vectors
from hllm_torchrec.inference.item_embedding import (
    EmbedReport,
    NewRows,
    changed_items,
    item_content_hashes,
    open_or_create_store,
    rank_chunks,
    write_rounds,
)
from hllm_torchrec.inference.user_embedder import open_embedder
from hllm_torchrec.store.keys import Hashes, hash_numbers, raw_keys
from hllm_torchrec.store.store import EmbeddingStore

BATCHES = 4
"""Number of batches of exposures between two commits."""

MAX_POSITION = 2**31


def exposure_keys(user_ids: Ints, positions: Ints) -> Ints:
    """Keys int64 [n] of the exposures at `positions` [n] in the sequences of `user_ids` [n]."""
    assert positions.size == 0 or 0 <= positions.min() <= positions.max() < MAX_POSITION
    return (user_ids << 32) | positions  # positions have at most 31 bits, so the two do not overlap


def split_exposure_keys(keys: Ints) -> tuple[Ints, Ints]:
    """(users, positions) [n] of keys [n] of `exposure_keys`."""
    return keys >> 32, keys & (MAX_POSITION - 1)


def exposure_content_hashes(item_ids: Ints, seconds: Ints) -> Hashes:
    """Hash of each exposure's item and second: uint64 [n]."""
    return hash_numbers(item_ids, seconds)


@dataclass(frozen=True)
class ExposureReport:
    """Result of `embed_exposures`. coverage: part -> coverage; seconds: duration of embedding and writing."""

    coverage: dict[str, Coverage]
    version: int
    seconds: float


def embed_exposures(
    loaded: LoadedRun, path: Path, mode: Mode, splits: Sequence[str] = SPLITS, dtype: str = "fp16"
) -> ExposureReport:
    """Write the user vectors of all exposures of `splits` into a store (created if missing). Collective.

    Must be called within `loaded.weights`. An exposure that sees no earlier event (nearline) or no event of an earlier
    day (daily) of its user has no vector.

    Raises:
        ValueError: a part is empty, or the store was made by a different checkpoint or in a different mode.
    """
    experiment = loaded.experiment
    facts = {
        "part": "exposures",
        "mode": mode,
        "weights": loaded.fingerprint,
        "fusion": experiment.config.objective.fusion,
        "max_history": experiment.config.data.max_history,
    }
    store = open_or_create_store(path, experiment.hllm.user_vector_width, dtype, facts, keys="int64")
    started, found, version = time.perf_counter(), {}, store.snapshot().version
    for part in splits:
        counts = torch.zeros(2, dtype=torch.int64)
        batches = exposure_vectors(experiment, part, mode)
        # iter(callable, []) yields lists of BATCHES batches until a list is empty. Rounds are collective; all ranks
        # have the same number of batches, and so of rounds.
        rounds = iter(lambda batches=batches: list(islice(batches, BATCHES)), [])  # type: ignore[misc]

        def encode(batch: ExposureVectors, counts: Tensor = counts) -> NewRows:
            counts += torch.tensor([batch.label.size, int(batch.has_user.sum())])
            return _rows_of(batch)

        version = write_rounds(store, rounds, encode, f"embed exposures of {part}", None)
        found[part] = Coverage(*map(int, global_sum(counts).tolist()))
    return ExposureReport(found, version, time.perf_counter() - started)


def _rows_of(batch: ExposureVectors) -> NewRows:
    """Keys, vectors and content hashes of the exposures that have a user vector."""
    rows = np.flatnonzero(batch.has_user.cpu().numpy())
    keys = exposure_keys(batch.user_id[rows], batch.position[rows])
    return pa.array(keys), batch.users.cpu()[rows], exposure_content_hashes(batch.item_id[rows], batch.timestamp[rows])


@torch.no_grad()
def embed_item_features(loaded: LoadedRun, path: Path, dtype: str = "fp16") -> EmbedReport:
    """Update a store of item vectors as inputs of the user encoder, P(E) + ID + item features. Collective.

    Late fusion compares these vectors with the user's vector; for an item without interactions the vector still has the
    text component. Keys are raw item ids. Must be called within `loaded.weights`.

    Raises:
        ConfigError: the model has no Item LLM.
        ValueError: the store was made by a different checkpoint.
    """
    experiment = loaded.experiment
    if experiment.item_encoder is None:
        raise ConfigError("item_llm.enabled: false: a model without an Item LLM has no item vectors to give")
    facts = {"part": "item_features", "weights": loaded.fingerprint}
    store = open_or_create_store(path, experiment.hllm.user.width, dtype, facts)
    raw_ids = raw_keys(experiment.dataset.items["raw_item_id"], store.kind)
    marks = item_content_hashes(experiment.item_encoder.tokens)
    todo, started = changed_items(store, raw_ids, marks), time.perf_counter()
    rounds = rank_chunks(todo, np.full(experiment.dataset.num_items, 1, np.int64))
    collator = experiment.request_collator()

    def encode(ids: Ints) -> NewRows:
        embedded = vectors_by_features(experiment, collator, ids)
        return raw_ids.take(pa.array(ids - 1)), embedded, marks[ids]

    with open_embedder(experiment) if rounds else nullcontext():
        version = write_rounds(store, rounds, encode, "embed item features", len(rounds))
    return EmbedReport(len(raw_ids), todo.size, version, time.perf_counter() - started)


class ExposureLookup:
    """Reads user vectors of exposures from the snapshot of a store taken at construction.

    Raises:
        ValueError: the store does not exist, or is not a store of exposures.
    """

    def __init__(self, path: str | Path) -> None:
        self.store = EmbeddingStore.open(path)
        if self.store.facts.get("part") != "exposures":
            raise ValueError(f"{path}: a store of {self.store.facts.get('part')}, not of exposures: see hllm exposures")
        self._snapshot = self.store.snapshot()
        self.width = self.store.width

    def __call__(self, user_ids: Ints, positions: Ints, item_ids: Ints, seconds: Ints) -> Tensor:
        """Exposures [n] -> float32 [n, D + 1]: vectors (zeros if missing); the last column is 1 if missing, else 0.

        Raises:
            ValueError: an exposure in the store has a different item or second, so the store has other sequences.
        """
        keys = exposure_keys(user_ids, positions)
        marks, known = self._snapshot.content_hashes(keys)
        mismatch = known & (marks != exposure_content_hashes(item_ids, seconds))
        if mismatch.any():
            row = int(np.flatnonzero(mismatch)[0])
            raise ValueError(
                f"{self.store.root}: event {positions[row]} of user {user_ids[row]} has another item or second: the "
                "store was made from another dataset; make the store from a run on this one"
            )
        vectors, _ = self._snapshot.gather(keys)
        return torch.cat([vectors, torch.from_numpy(~known)[:, None].float()], dim=1)


def coverage_lines(report: ExposureReport) -> Iterator[str]:
    """Yield one line on the coverage per part."""
    for part, found in report.coverage.items():
        yield f"{part}: {found.with_user:,} of {found.exposures:,} exposures ({found.share:.1%}) have a user vector"
