"""Trains RecTools' SASRec on a leave-one-out dataset of this library, and writes its ranks in this library's format.

Install RecTools in a separate environment, and run this script there:

    python -m venv rectools && rectools/bin/pip install "rectools[torch]==0.19.0" "pyarrow<21"
    rectools/bin/python scripts/experiments/compare_rectools.py --dataset data/ml-100k-loo \\
        --output runs/retrieval/rectools_sasrec-0
    python scripts/experiments/retrieval_table.py --others rectools_sasrec      # in this library's environment

The protocol is that of this library's models: the same split, the same order of events, all items are candidates except
those of the user's complete history, and the checkpoint is chosen by NDCG@10 on the validation part. The test part is
ranked once, with the chosen weights (not at all with --no-test). A target that RecTools does not know, because it
occurs in no training sequence, gets the last rank.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

Ints = NDArray[np.int64]  # not imported: RecTools' environment does not have this library
KS = (10, 50, 200)
CHOSEN_BY = "ndcg@10"


@dataclass(frozen=True)
class Part:
    """Targets of a part, one per user, and the histories before them.

    user_id, position, target: int64 [B]; position: index of the target in the user's complete sequence; histories: B
    arrays of item ids, oldest first.
    """

    user_id: Ints
    position: Ints
    target: Ints
    histories: list[Ints]


def read_part(dataset: Path, split: str) -> Part:
    """Read a part of a dataset; the last event of every user is the target.

    Raises:
        ValueError: the dataset's split is not leave_one_out, or the part is empty.
    """
    rule = json.loads((dataset / "manifest.json").read_text())["split"]["rule"]
    if rule != "leave_one_out":
        raise ValueError(f"--dataset {dataset}: split by {rule!r}; prepare one with --split leave_one_out")
    files = sorted((dataset / "sequences" / split).glob("part-*.parquet"))
    rows = [row for file in files for row in pq.read_table(file, columns=["user_id", "item_ids"]).to_pylist()]
    if not rows:
        raise ValueError(f"--dataset {dataset}: its part {split!r} is empty")
    events = [np.array(row["item_ids"], np.int64) for row in rows]
    return Part(
        user_id=np.array([row["user_id"] for row in rows], np.int64),
        position=np.array([len(items) - 1 for items in events], np.int64),
        target=np.array([items[-1] for items in events], np.int64),
        histories=[items[:-1] for items in events],
    )


def interactions(part: Part) -> dict[str, Any]:
    """The histories of a part as RecTools' columns.

    The time of an event is its position in the sequence, so that events of the same second have the same order as for
    this library's models.
    """
    lengths = [history.size for history in part.histories]
    positions = np.concatenate([np.arange(length) for length in lengths])
    return {
        "user_id": np.repeat(part.user_id, lengths),
        "item_id": np.concatenate(part.histories),
        "weight": np.ones(positions.size),
        "datetime": positions.astype("datetime64[s]").astype("datetime64[ns]"),
    }


def ranks_of_targets(part: Part, users: Ints, items: Ints, ranks: Ints, candidates: int) -> Ints:
    """Rank [B] of each target of `part` among the recommendations; `candidates`, the last rank, if it is not there.

    users, items, ranks: [n], one row per recommendation; rank 1 is the best.
    """
    row_of_user = {user: row for row, user in enumerate(part.user_id.tolist())}
    rows = np.array([row_of_user[user] for user in users.tolist()], np.int64)
    found = np.full(part.target.size, candidates, np.int64)
    hits = items == part.target[rows]
    found[rows[hits]] = ranks[hits]
    return found


def metrics_of(ranks: Ints) -> dict[str, float]:
    """Recall@K and NDCG@K, means over targets."""
    found = {}
    for k in KS:
        hit = ranks <= k
        found |= {f"recall@{k}": float(hit.mean()), f"ndcg@{k}": float((hit / np.log2(ranks + 1.0)).mean())}
    return found


def write_ranks(part: Part, ranks: Ints, directory: Path) -> None:
    """Write the ranks in the format that `evaluation.retrieval_comparison.read_target_ranks` reads."""
    directory.mkdir(parents=True, exist_ok=True)
    columns = {"user_id": part.user_id, "position": part.position, "item_id": part.target, "rank": ranks}
    pq.write_table(pa.table(columns), directory / "part-00000.parquet")


def build_model(settings: Mapping[str, Any], history: int, seed: int) -> Any:
    """Build RecTools' SASRecModel; settings: arguments of its constructor."""
    import pytorch_lightning
    from rectools.models import SASRecModel

    pytorch_lightning.seed_everything(seed, verbose=False)
    return SASRecModel(session_max_len=history, deterministic=True, recommend_torch_device="cpu", **settings)


def rank_part(model: Any, part: Part, candidates: int) -> Ints:
    """Ranks [B] of a part's targets by the model with its current weights."""
    import pandas as pd
    from rectools.dataset import Dataset

    dataset = Dataset.construct(pd.DataFrame(interactions(part)))
    found = model.recommend(users=part.user_id, dataset=dataset, k=candidates, filter_viewed=True)
    columns = (found[name].to_numpy(np.int64) for name in ("user_id", "item_id", "rank"))
    return ranks_of_targets(part, *columns, candidates)


def train(model: Any, dataset: Path, candidates: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """Train until the validation metric stops improving; return all evaluations. The model then has the best weights.

    options: `epochs`, `every`, `patience` and `minutes` of the command line.
    """
    import pandas as pd
    from rectools.dataset import Dataset

    valid = read_part(dataset, "valid")  # its histories are the training part
    events = Dataset.construct(pd.DataFrame(interactions(valid)))
    curve: list[dict[str, float]] = []
    best, weights, started = -math.inf, None, time.perf_counter()
    for epoch in range(options.every, options.epochs + 1, options.every):
        model.fit_partial(events, min_epochs=options.every, max_epochs=options.every)
        found = metrics_of(rank_part(model, valid, candidates))
        curve.append({"epoch": epoch, "seconds": time.perf_counter() - started, **found})
        print(json.dumps({key: round(value, 4) for key, value in curve[-1].items()}), flush=True)
        if found[CHOSEN_BY] > best:
            best, weights = found[CHOSEN_BY], copy.deepcopy(model.torch_model.state_dict())
        is_stale = [entry[CHOSEN_BY] for entry in curve].index(best) < len(curve) - options.patience
        if is_stale or curve[-1]["seconds"] > options.minutes * 60:
            break
    assert weights is not None, "no epoch was trained"
    model.torch_model.load_state_dict(weights)
    return curve


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", type=Path, required=True, help="prepared with --split leave_one_out")
    parser.add_argument("--output", type=Path, required=True, help="folder for this run's ranks and metrics")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--history", type=int, default=200, help="session_max_len")
    parser.add_argument("--epochs", type=int, default=100, help="largest number of epochs (default: 100)")
    parser.add_argument("--every", type=int, default=5, help="epochs between evaluations")
    parser.add_argument(
        "--patience", type=int, default=4, help="stop after so many evaluations without a better NDCG@10"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after the first evaluation beyond this time"
    )
    parser.add_argument("--settings", type=json.loads, default={}, help="arguments of SASRecModel, as JSON")
    parser.add_argument("--no-test", action="store_true", help="do not rank the test part")
    return parser.parse_args()


def main() -> int:
    """Train, choose on validation, rank the test part once."""
    options = parse()
    candidates = json.loads((options.dataset / "manifest.json").read_text())["counts"]["items"]
    model = build_model(options.settings, options.history, options.seed)
    curve = train(model, options.dataset, candidates, options)
    best = max(curve, key=lambda entry: entry[CHOSEN_BY])
    facts = {"settings": options.settings, "history": options.history, "seed": options.seed}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "metrics-valid.json").write_text(json.dumps({**facts, "best": best, "curve": curve}, indent=1))
    print(f"validation, epoch {best['epoch']:.0f}: {CHOSEN_BY} {best[CHOSEN_BY]:.4f}", flush=True)
    if not options.no_test:
        test = read_part(options.dataset, "test")
        ranks = rank_part(model, test, candidates)
        write_ranks(test, ranks, options.output / "retrieval" / "test")
        (options.output / "metrics.json").write_text(json.dumps({**facts, "retrieval": metrics_of(ranks)}, indent=1))
        print(f"test: {metrics_of(ranks)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
