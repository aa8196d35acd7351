"""Embedding job: what is new or changed since the store's last commit is encoded, on all ranks, and committed.

An item's mark in the store is a hash of its tokens, so a job that is run again, or again after a crash, encodes only
what is missing: its cost follows what changed, not the catalogue.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hllm_torchrec import ranks
from hllm_torchrec.data.tokens import TokenStore
from hllm_torchrec.errors import ConfigError
from hllm_torchrec.experiment import Experiment
from hllm_torchrec.items import CATALOGUE_TOKENS, chunks_of
from hllm_torchrec.logs import progress
from hllm_torchrec.modules.lora import merged
from hllm_torchrec.parallelize import autocast, whole
from hllm_torchrec.remote.files import url_of
from hllm_torchrec.store.keys import Hashes, KeyKind, hash_bytes
from hllm_torchrec.store.layout import RunFacts
from hllm_torchrec.store.published import PublishedStore, store_to_write
from hllm_torchrec.store.store import EmbeddingStore, StoreWriter

COMMIT_TOKENS = 2_000_000
"""A rank encodes about so many tokens between two commits: what a crash can cost."""

T = TypeVar("T")
NewRows = tuple[pa.Array, Tensor, Hashes]
"""What goes into a store: keys [n], vectors [n, D] float32, marks [n]."""


@dataclass(frozen=True)
class EmbedReport:
    """What a job did. items: of the dataset; encoded: of them, now; seconds: encoding and writing."""

    items: int
    encoded: int
    version: int
    seconds: float


def item_facts(experiment: Experiment) -> dict[str, Any]:
    """What item embeddings depend on besides the texts: weights, pooling, tokeniser, text layout. Collective.

    Raises:
        ConfigError: the model has no Item LLM.
    """
    item_llm, encoder = experiment.hllm.item_llm, experiment.encoder
    if item_llm is None or encoder is None:
        raise ConfigError(["item_llm.enabled: false: a model without an Item LLM has no item embeddings to store"])
    layout = ("tokenizer", "prompt", "keys", "separator", "max_text_length")
    return {
        "part": "items",
        "weights": hash_weights(item_llm),
        "pooling": item_llm.pooling,
        **{name: encoder.tokens.facts[name] for name in layout},
    }


def hash_weights(module: nn.Module) -> str:
    """SHA-256 of a module's weights, names and shapes included, wherever they are. Collective."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.named_parameters()):
        values = whole(weight.detach()).cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def item_marks(tokens: TokenStore) -> Hashes:
    """uint64 [N]: a hash of each item's tokens."""
    return hash_bytes(np.ascontiguousarray(tokens.values).view(np.uint8), tokens.offsets * tokens.values.itemsize)


@torch.no_grad()
def embed_items(experiment: Experiment, path: Path, dtype: str = "fp16") -> EmbedReport:
    """Bring the item store at `path` (made if it is not there) up to date with the dataset. Collective.

    Keys are raw item ids. Ranks share the work by tokens; each writes its own rows, and rank 0 commits those of all.

    Raises:
        ValueError: the store was made by another model, or another process is writing to it.
    """
    facts = item_facts(experiment)
    store = open_or_create(path, experiment.hllm.item_llm.width, dtype, facts)  # type: ignore[union-attr]
    encoder = experiment.encoder
    assert encoder is not None
    raw_ids, marks = experiment.dataset.items["raw_item_id"], item_marks(encoder.tokens)
    todo = changed(store, raw_ids, marks)
    rounds = shares(todo, encoder.tokens.lengths + 1)
    started, model = time.perf_counter(), experiment.hllm.eval()

    def encode(ids: NDArray[np.int64]) -> NewRows:
        with autocast(experiment.config, experiment.device):
            vectors = model.embed_items(torch.from_numpy(ids).to(experiment.device))
        return raw_ids.take(ids - 1).cast("large_string").combine_chunks(), vectors.float(), marks[ids]

    with merged(model):
        version = write_rounds(store, rounds, encode, "embed items", len(rounds))
    return EmbedReport(len(raw_ids), todo.size, version, time.perf_counter() - started)


def write_rounds(
    store: EmbeddingStore, rounds: Iterable[Sequence[T]], encode: Callable[[T], NewRows], what: str, total: int | None
) -> int:
    """Encode every chunk of every round and commit after each round; returns the store's version. Collective.

    Args:
        rounds: this rank's chunks; every rank has as many rounds, each of as many chunks.
        encode: chunk -> its rows, which may be none; it may be collective.
        what, total: name and length (None: not known) of the progress bar.

    Raises:
        ValueError: another process is writing to the store.
    """
    published = store.published
    with ExitStack() as stack:
        writer: list[StoreWriter] = []
        ranks.on_rank_zero(lambda: writer.append(stack.enter_context(store.writer())))
        with progress(total, what, ranks.rank() == 0) as bar:
            for chunks in rounds:
                run = store.run_writer()
                for chunk in chunks:
                    run.add(*encode(chunk))
                written = ranks.together(run.finish)
                if published is not None:
                    published.gather(written)
                ranks.on_rank_zero(partial(_commit, writer, written, published))
                bar.update(1)
        return ranks.on_rank_zero(lambda: store.snapshot().version)


def _commit(writer: list[StoreWriter], written: list[RunFacts], published: PublishedStore | None) -> None:
    """Rank 0's writer takes in what every rank has written, and publishes it where the store is at a URL."""
    writer[0].commit(written)
    if published is not None:
        published.publish()


def open_or_create(
    path: Path, width: int, dtype: str, facts: dict[str, Any], keys: KeyKind = "string"
) -> EmbeddingStore:
    """The store at `path`, of this model, to write to; of one at a URL a copy on each host. Collective.

    Raises:
        ValueError: it was made by another model, or cannot be reached.
    """
    url = url_of(path)

    def on_one() -> None:
        root = path if url is None else store_to_write(url)
        if not (root / "store.json").is_file():
            published = None if url is None else PublishedStore(url, root)
            EmbeddingStore.create(root, width, dtype, keys, facts)
            if published is not None:
                published.publish()
        EmbeddingStore.open(root).require(facts)

    ranks.on_rank_zero(on_one)
    if url is None:
        return EmbeddingStore.open(path)
    store = EmbeddingStore.open(ranks.together(lambda: store_to_write(url))[ranks.rank()])
    store.published = PublishedStore(url, store.root)
    return store


def changed(store: EmbeddingStore, raw_ids: Any, marks: Hashes) -> NDArray[np.int64]:
    """Ids [k] int64 (from 1, rising) whose vector is missing in the store or was made from something else.

    raw_ids: [N - 1] of the items from 1 on; marks: [N] uint64 of what each vector is to be made from, 0 first.
    """
    stored, known = store.snapshot().marks(pc.cast(raw_ids, "large_string").combine_chunks())
    return 1 + np.flatnonzero(~known | (stored != marks[1:]))


def shares(ids: NDArray[np.int64], costs: NDArray[np.int64]) -> list[list[NDArray[np.int64]]]:
    """What this rank encodes: rounds, each of chunks of ids, as many on every rank (some may be empty).

    ids: [k] int64; costs: [N] int64 tokens by id. Sorted by length, ids are dealt out in turn; a chunk has about
    CATALOGUE_TOKENS tokens, a round (what lies between two commits) about COMMIT_TOKENS.
    """
    world, rank = ranks.world_size(), ranks.rank()
    chunks = [chunk[rank::world] for chunk in chunks_of(ids, costs, CATALOGUE_TOKENS * world)]
    per_round = max(1, COMMIT_TOKENS // CATALOGUE_TOKENS)
    return [chunks[i : i + per_round] for i in range(0, len(chunks), per_round)]
