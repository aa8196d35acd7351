"""Effect of quantized tables on a trained run: bytes, score differences and AUC of the validation part, as JSON.

python scripts/experiments/table_types.py --run runs/quickstart --out benchmarks/DATE-table_types.json
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from hllm_torchrec.common.machine import machine_info
from hllm_torchrec.config.schema import Config
from hllm_torchrec.distributed.process_group import init_distributed
from hllm_torchrec.evaluation.run_loader import load_run, run_config
from hllm_torchrec.evaluation.scoring import score_split
from hllm_torchrec.inference.quantization import TABLE_TYPES, TableBytes, quantize_items, quantize_tables


def measure(run: Path, device: torch.device) -> dict[str, Any]:
    """Score the validation part with tables as trained, then in each type."""
    found: dict[str, Any] = {}
    exact, auc = scores(run, device, None)[0]
    found["as trained"] = {"auc": auc, "rows": int(exact.size)}
    for dtype in TABLE_TYPES:
        (small, of_small), tables, items = scores(run, device, dtype)
        difference = np.abs(small - exact)
        found[dtype] = {
            "auc": of_small,
            "auc_difference": of_small - auc,
            "score_difference_largest": float(difference.max()),
            "score_difference_mean": float(difference.mean()),
            "score_deviation": float(exact.std()),
            "table_bytes": _sums(tables),
            "item_vector_bytes": _sums(items),
        }
    return found


def scores(
    run: Path, device: torch.device, dtype: str | None
) -> tuple[tuple[np.ndarray, float], TableBytes, TableBytes]:
    """Scores and AUC of the validation part, and bytes of tables and item vectors before and after."""
    config: Config = run_config(run)
    loaded = load_run(run, "best", device, config)
    experiment, nothing = loaded.experiment, TableBytes({}, {})
    with loaded.weights:
        experiment.hllm.eval()
        if dtype is None:
            experiment.use_cached_items()
            tables, items = nothing, nothing
        else:
            tables, items = quantize_tables(experiment, dtype), quantize_items(experiment, dtype)
        loader = experiment.loader("valid", config.evaluation.batch_users)
        columns = score_split(experiment, loader)
    return (columns["score"], float(roc_auc_score(columns["label"], columns["score"]))), tables, items


def _sums(tables: TableBytes) -> dict[str, int]:
    return {"before": sum(tables.before.values()), "after": sum(tables.after.values())}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="directory of a run with a ranking head")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    machine = machine_info()
    found = {
        "bench": "table_types",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "run": options.run.name,
        "found": measure(options.run, init_distributed()),
        "versions": {"python": machine["python"], **machine["packages"]},
        "machine": {name: machine[name] for name in ("cpu", "cores", "gpus")},
        "commit": machine["commit"],
    }
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
