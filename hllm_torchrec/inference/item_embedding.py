"""Incremental embedding job for items: encodes new and changed items on all ranks and commits them to the store.

The content hash of an item in the store is a hash of its tokens. A job that is repeated, or restarted after a crash,
encodes only the missing items, so its cost depends on the changes and not on the size of the catalogue.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from hllm_torchrec.common.progress import progress
from hllm_torchrec.common.urls import url_of
from hllm_torchrec.data.token_store import TokenStore
from hllm_torchrec.distributed import coordination
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.fingerprint import item_facts
from hllm_torchrec.models.item_encoder import CATALOGUE_TOKENS, length_sorted_chunks
from hllm_torchrec.models.parallelize import autocast, compute_dtype
from hllm_torchrec.modules.lora import merged
from hllm_torchrec.store.files import SegmentFacts
from hllm_torchrec.store.keys import Hashes, KeyKind, hash_bytes, is_key, raw_keys
from hllm_torchrec.store.remote_store import RemoteStore, writable_store
from hllm_torchrec.store.store import EmbeddingStore, StoreWriter

COMMIT_TOKENS = 2_000_000
"""Approximate number of tokens that a rank encodes between two commits, which is the work that a crash can lose."""

T = TypeVar("T")
NewRows = tuple[pa.Array, Tensor, Hashes]
"""Rows to store: (keys [n], vectors [n, D] float32, content hashes [n])."""


@dataclass(frozen=True)
class EmbedReport:
    """Result of a job. items: number of items in the dataset; encoded: number of items encoded by this job; seconds:
    duration of encoding and writing."""

    items: int
    encoded: int
    version: int
    seconds: float


def item_content_hashes(tokens: TokenStore) -> Hashes:
    """Hash of each item's tokens: uint64 [N]."""
    return hash_bytes(np.ascontiguousarray(tokens.values).view(np.uint8), tokens.offsets * tokens.values.itemsize)


@torch.no_grad()
def embed_items(experiment: Experiment, path: Path, dtype: str = "fp16", keys: KeyKind | None = None) -> EmbedReport:
    """Update the item store at `path` (created if missing) to the dataset. Collective.

    Keys are raw item ids. keys: type of the keys, "string" or "int64"; None: the store's type, "string" for a new one.
    Work is divided among the ranks by tokens; each rank writes its rows, and rank 0 commits them.

    Raises:
        ConfigError: the model has no Item LLM.
        ValueError: the store was made by a different model, another process is writing to it, or `keys` is "int64" and
            raw ids are not numbers.
    """
    facts, raw_items = item_facts(experiment), experiment.dataset.items["raw_item_id"]
    raw_keys(raw_items, keys or "string")  # raises for invalid ids before a store is created
    store = open_or_create_store(path, experiment.hllm.item_llm.width, dtype, facts, keys)  # type: ignore[union-attr]
    encoder = experiment.item_encoder
    assert encoder is not None
    raw_ids = raw_keys(raw_items, store.kind)
    marks = item_content_hashes(encoder.tokens)
    todo = changed_items(store, raw_ids, marks)
    rounds = rank_chunks(todo, encoder.tokens.lengths + 1)  # + 1: the [ITEM] vector
    started, model = time.perf_counter(), experiment.hllm.eval()

    def encode(ids: NDArray[np.int64]) -> NewRows:
        with autocast(experiment.config, experiment.device):
            vectors = model.embed_items(torch.from_numpy(ids).to(experiment.device), experiment.live_items)
        return raw_ids.take(pa.array(ids - 1)), vectors.float(), marks[ids]

    with merged(model), fast_products(experiment):
        version = write_rounds(store, rounds, encode, "embed items", len(rounds))
    return EmbedReport(len(raw_ids), todo.size, version, time.perf_counter() - started)


def fast_products(experiment: Experiment) -> AbstractContextManager[None]:
    """Context in which the Item LLM encodes with fused kernels, if it runs in bfloat16 on a CPU and has them."""
    dtype, item_llm = compute_dtype(experiment.config), experiment.hllm.item_llm
    if item_llm is None or dtype is torch.float32 or experiment.device.type != "cpu":
        return nullcontext()
    from hllm_torchrec.modules.encoders.fused_inference import can_run_fused, fused_inference  # imports transformers

    return fused_inference(item_llm, dtype) if can_run_fused(item_llm) else nullcontext()


def write_rounds(
    store: EmbeddingStore, rounds: Iterable[Sequence[T]], encode: Callable[[T], NewRows], what: str, total: int | None
) -> int:
    """Encode all chunks and commit after each round; returns the store's version. Collective.

    Args:
        rounds: this rank's chunks; all ranks have the same number of rounds, each with the same number of chunks.
        encode: function that returns the rows of a chunk, possibly none; it may be collective.
        what, total: name and length (None: unknown) of the progress bar.

    Raises:
        ValueError: another process is writing to the store.
    """
    published = store.published
    with ExitStack() as stack:
        writer: list[StoreWriter] = []  # stays empty on other ranks: the writer's lock is exclusive
        coordination.run_on_rank_zero(lambda: writer.append(stack.enter_context(store.writer())))
        with progress(total, what, coordination.rank() == 0) as bar:
            for chunks in rounds:
                run = store.segment_writer()
                for chunk in chunks:
                    run.add(*encode(chunk))
                # Segments must be complete on all ranks before rank 0 commits them, and must be at the URL before the
                # manifest that lists them is published.
                written = coordination.run_on_all_ranks(run.finish)
                if published is not None:
                    published.upload_segments(written)
                coordination.run_on_rank_zero(partial(_commit, writer, written, published))
                bar.update(1)
        return coordination.run_on_rank_zero(lambda: store.snapshot().version)


def _commit(writer: list[StoreWriter], written: list[SegmentFacts], published: RemoteStore | None) -> None:
    """Commit the segments of all ranks with rank 0's writer, and publish the version if the store is at a URL."""
    writer[0].commit(written)
    if published is not None:
        published.publish()


def open_or_create_store(
    path: Path, width: int, dtype: str, facts: dict[str, Any], keys: KeyKind | None = None
) -> EmbeddingStore:
    """Open or create this model's store at `path` for writing; for a URL, a copy on each host. Collective.

    keys: type of the keys; None: that of an existing store, or "string" for a new one.

    Raises:
        ValueError: the store was made by a different model, its keys have another type, or it cannot be reached.
    """
    url = url_of(path)

    def on_one() -> None:
        root = path if url is None else writable_store(url)
        if not (root / "store.json").is_file():
            published = None if url is None else RemoteStore(url, root)
            EmbeddingStore.create(root, width, dtype, keys or "string", facts)
            if published is not None:
                published.publish()
        store = EmbeddingStore.open(root)
        store.require(facts)
        if keys not in (None, store.kind):
            raise ValueError(f"{root}: its keys are of type {store.kind}, not {keys}: embed into a new store")

    coordination.run_on_rank_zero(on_one)
    if url is None:
        return EmbeddingStore.open(path)
    store = EmbeddingStore.open(coordination.run_on_all_ranks(lambda: writable_store(url))[coordination.rank()])
    store.published = RemoteStore(url, store.root)
    return store


def changed_items(store: EmbeddingStore, raw_ids: pa.Array, content_hashes: Hashes) -> NDArray[np.int64]:
    """Ids [k] int64 (from 1, ascending) whose vector is missing in the store or was made from different content.

    Forgotten items, whose raw ids are erased, are left out.

    raw_ids: [N - 1] keys of the store (`raw_keys`) for ids from 1; content_hashes: [N] uint64 of the current content,
    for ids from 0.
    """
    stored, known = store.snapshot().content_hashes(raw_ids)
    return 1 + np.flatnonzero((~known | (stored != content_hashes[1:])) & is_key(raw_ids))


def rank_chunks(ids: NDArray[np.int64], costs: NDArray[np.int64]) -> list[list[NDArray[np.int64]]]:
    """Rounds of chunks of ids that this rank encodes; all ranks have the same number of rounds and chunks.

    Chunks may be empty.

    ids: [k] int64; costs: [N] int64 tokens by id. Ids are sorted by length and assigned to ranks round-robin; a chunk
    has about CATALOGUE_TOKENS tokens, a round (the work between two commits) about COMMIT_TOKENS.
    """
    # Neighbors in a sorted chunk have similar lengths, so taking every world-th id gives ranks about equal costs.
    world, rank = coordination.world_size(), coordination.rank()
    chunks = [chunk[rank::world] for chunk in length_sorted_chunks(ids, costs, CATALOGUE_TOKENS * world)]
    per_round = max(1, COMMIT_TOKENS // CATALOGUE_TOKENS)
    return [chunks[i : i + per_round] for i in range(0, len(chunks), per_round)]
