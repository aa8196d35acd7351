"""Ranks without anything to do in an evaluation or an embedding job take part in it, and nobody waits for ever."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hllm_torchrec.config.schema import Config
from hllm_torchrec.distributed.coordination import rank
from hllm_torchrec.distributed.process_group import init_distributed
from hllm_torchrec.evaluation.scoring import score_split
from hllm_torchrec.inference.item_embedding import embed_items
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.store import EmbeddingStore
from tests.helpers import fixtures
from tests.helpers.distributed import run_ranks
from tests.helpers.training_fixtures import config

RAW_IDS = fixtures.dataset().items["raw_item_id"].to_pylist()


def evaluate_and_embed(settings: Config, store: Path) -> dict[str, Any]:
    """On each of two ranks: batches that are empty, exposures scored, items encoded a second time."""
    experiment = build_experiment(settings, init_distributed())
    loader = experiment.loader("valid", settings.evaluation.batch_users)
    empty = sum(batch.item_ids.numel() == 0 for batch in loader.batches(0))
    scored = score_split(experiment, loader)
    embed_items(experiment, store, "fp32")
    if rank() == 0:
        changed = EmbeddingStore.open(store)
        with changed.writer() as writer:  # as if one text had been another
            writer.upsert(RAW_IDS[5:6], torch.zeros(1, changed.width), np.array([1], np.uint64))
            writer.commit()
    torch.distributed.barrier()
    again = embed_items(experiment, store, "fp32").encoded
    return {"empty": empty, "rows": len(scored["score"]), "again": again}


@pytest.mark.slow
def test_ranks_without_users_or_items_take_part_in_evaluating_and_embedding(tmp_path: Path) -> None:
    users = len(fixtures.pieces("valid"))
    assert users % 2 == 1, "so that the last batch has a user for one of two ranks"
    settings = config(tmp_path / "run", evaluation__batch_users=1, data__max_history=64)
    found = run_ranks(evaluate_and_embed, 2, settings, tmp_path / "store", timeout=60)
    assert sorted(one["empty"] for one in found) == [0, 1]
    exposures = sum(np.isfinite(piece.labels[piece.first_target :]).sum() for piece in fixtures.pieces("valid"))
    assert sum(one["rows"] for one in found) == exposures
    assert [one["again"] for one in found] == [1, 1]
    vectors, known = EmbeddingStore.open(tmp_path / "store").snapshot().gather(RAW_IDS)
    assert known.all() and bool((vectors[5] != 0).any())
