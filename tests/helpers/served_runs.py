"""Tiny runs of several kinds that are served, each with the scores that its evaluation gave."""

from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from hllm_torchrec.distributed.process_group import init_distributed
from hllm_torchrec.evaluation.run_loader import score_run
from tests.helpers import fixtures
from tests.helpers.training_fixtures import config, train

HSTU = {"width": 16, "layers": 2, "heads": 2, "divide_by": 20}
RICH: dict[str, Any] = {
    "data__max_history": 64,
    "data__numeric_features": ["user_mean", "log_gap", "history_length"],
    "features__action_gate": True,
    "features__init_scale": 0.3,
}
EVIDENCE = ["factors", "items", "users", "neighbors", "tastes", "crosses"]
RUNS: dict[str, dict[str, Any]] = {
    "early": {**RICH, "objective__fusion": "early", "optim__ema": 0.5},
    "late": {**RICH, "objective__fusion": "late", "data__item_vectors": ["factors"]},
    "hstu": {
        **RICH,
        "objective__fusion": "early",
        "parallel__dense": "fsdp",  # trained and evaluated so; a scorer has all weights in one process
        "user__encoder": "hstu",
        "user__shape": HSTU,
        "data__history": "positive",
    },
    "delayed": {**RICH, "objective__fusion": "early", "data__feedback_delay": 80_000},
    "evidence": {**RICH, "objective__fusion": "early", "data__evidence": EVIDENCE, "item_llm__trainable": False},
    "late evidence": {**RICH, "objective__fusion": "late", "data__evidence": [*EVIDENCE[:3], "crosses"]},
    "leave one out": {**RICH, "objective__fusion": "early"},
}


def rule(kind: str) -> str:
    return "leave_one_out" if kind == "leave one out" else "time"


def settings(kind: str, output: Path, **more: Any) -> Any:
    return config(output, **{"data__dataset": fixtures.dataset(rule(kind)).root, **RUNS[kind], **more})


@cache
def trained(kind: str) -> tuple[Path, dict[tuple[int, int], float]]:
    """A run, and the scores that its evaluation gave: (user, position) -> score."""
    run = fixtures.folder() / "served" / kind
    train(settings(kind, run))
    predictions = score_run(run, "test", "latest", init_distributed()).predictions
    assert predictions is not None
    table = pq.read_table(predictions)
    keys = zip(table["user_id"].to_pylist(), table["position"].to_pylist())
    return run, dict(zip(keys, table["score"].to_pylist(), strict=True))
