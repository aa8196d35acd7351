"""The table of three_stages.sh: AUC and NE of every row of stage III, and differences from the DLRM alone.

    python scripts/experiments/three_stages.py --output runs/stages --seeds 0 1 2 [--splits test] [--covered]

Values are means over seeds, ± the standard deviation. Intervals (95%) resample users, with the same draws for every row
and seed; the interval of a difference is that of the mean over seeds of paired differences. DeLong's test is paired on
the same exposures for each seed; the table shows the largest p of the seeds. `--fallback` adds rows in which the DLRM
alone scores the exposures without a daily user vector; `--covered` adds tables of the exposures with a daily user
vector, and of those without.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from jobs import experiment_parser

from hllm_torchrec.data.predictions import Predictions, read_predictions
from hllm_torchrec.inference.exposure_store import exposure_keys
from hllm_torchrec.metrics.auc import delong_test, roc_auc
from hllm_torchrec.metrics.bootstrap import percentile_interval, user_bootstrap
from hllm_torchrec.metrics.probabilities import PROBABILITY_FLOOR
from hllm_torchrec.store.store import EmbeddingStore

ALONE = "alone"
Scored = dict[tuple[str, int], Predictions]


def summarise(scored: Scored, rows: list[str], seeds: list[int], draws: int) -> dict[str, Any]:
    """Row -> its metrics, and its differences from the first row.

    scored: (row, seed) -> predictions, all of the same exposures in the same order.
    """
    first = scored[rows[0], seeds[0]]
    labels, users = first.label, first.user_id
    for predictions in scored.values():
        assert np.array_equal(predictions.position, first.position) and np.array_equal(predictions.user_id, users)
    aucs = user_bootstrap(labels, {f"{r}/{s}": p.score for (r, s), p in scored.items()}, users, draws, seed=0)
    entropies = {key: entropy_draws(predictions, draws, seed=0) for key, predictions in scored.items()}
    found: dict[str, Any] = {}
    for row in rows:
        own = [scored[row, s] for s in seeds]
        base = [scored[rows[0], s] for s in seeds]
        auc_draws = np.mean([aucs[f"{row}/{s}"] for s in seeds], axis=0)
        base_draws = np.mean([aucs[f"{rows[0]}/{s}"] for s in seeds], axis=0)
        ne = [entropies[row, s] for s in seeds]
        ne_draws, base_ne = (np.mean([entropies[r, s][1:] for s in seeds], axis=0) for r in (row, rows[0]))
        of_seeds = [float(auc(p)) for p in own]
        tests = [delong_test(labels, p.score, b.score) for p, b in zip(own, base, strict=True)]
        found[row] = {
            "auc": float(np.mean(of_seeds)),
            "auc_deviation": float(np.std(of_seeds, ddof=1)) if len(seeds) > 1 else 0.0,
            "auc_interval": percentile_interval(auc_draws),
            "ne": float(np.mean([n[0] for n in ne])),
            "ne_interval": percentile_interval(ne_draws),
            "difference": float(np.mean(of_seeds) - np.mean([float(auc(p)) for p in base])),
            "difference_interval": percentile_interval(auc_draws - base_draws),
            "ne_difference": float(np.mean([n[0] for n in ne]) - np.mean([entropies[rows[0], s][0] for s in seeds])),
            "ne_difference_interval": percentile_interval(ne_draws - base_ne),
            "delong_p": max(test.p_value for test in tests),
        }
    return found


def auc(predictions: Predictions) -> float:
    """Exact AUC; a tie counts half."""
    return roc_auc(predictions.label, predictions.score)


def entropy_draws(predictions: Predictions, draws: int, seed: int) -> np.ndarray:
    """Normalized entropy [1 + draws]: of all rows, then of resampled users (the same draws as `user_bootstrap`)."""
    assert predictions.probability is not None
    is_positive = predictions.label == 1
    p = np.clip(predictions.probability, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    loss = -np.log(np.where(is_positive, p, 1 - p))
    _, users = np.unique(predictions.user_id, return_inverse=True)
    sums = np.stack([np.bincount(users, x) for x in (loss, is_positive.astype(float), np.ones(len(p)))])
    count, random = sums.shape[1], np.random.default_rng(seed)
    weights = [np.ones(count)]
    weights += [np.bincount(random.integers(count, size=count), minlength=count) for _ in range(draws)]
    loss_sum, positives, total = sums @ np.stack(weights, axis=1)
    rate = positives / total
    return loss_sum / total / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))


def markdown(found: dict[str, Any], base: str) -> str:
    """The table of docs/stages.md."""
    lines = [
        f"| row | AUC | NE | AUC - {base} | DeLong p | NE - {base} |",
        "|---|---|---|---|---|---|",
    ]
    for row, one in found.items():
        cells = [
            f"{one['auc']:.4f} ± {one['auc_deviation']:.4f} {bounds(one['auc_interval'])}",
            f"{one['ne']:.4f} {bounds(one['ne_interval'])}",
        ]
        if row == base:
            cells += ["–"] * 3
        else:
            cells += [
                f"{one['difference']:+.4f} {bounds(one['difference_interval'], '+')}",
                f"{one['delong_p']:.1e}",
                f"{one['ne_difference']:+.4f} {bounds(one['ne_difference_interval'], '+')}",
            ]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bounds(interval: tuple[float, float], sign: str = "") -> str:
    """`[low, high]`."""
    return f"[{interval[0]:{sign}.4f}, {interval[1]:{sign}.4f}]"


def read_rows(output: Path, seeds: list[int], split: str) -> tuple[Scored, list[str]]:
    """All predictions below `output`/seed-<seed>/3, and the names of the rows, of which the DLRM alone is the first.

    Raises:
        ValueError: there are no predictions, or the seeds have different rows.
    """
    folders = [output / f"seed-{seed}" / "3" for seed in seeds]
    names = [sorted(path.parents[1].name for path in folder.glob(f"*/predictions/{split}")) for folder in folders]
    if not names[0] or any(other != names[0] for other in names):
        raise ValueError(
            f"{output}: seeds {seeds} have the rows {names}, which must be equal and not empty: run "
            "scripts/experiments/three_stages.sh for all seeds first"
        )
    rows = sorted(names[0], key=lambda name: (name != ALONE, name != "items", name))
    scored = {
        (row, seed): read_predictions(folder / row / "predictions" / split)
        for row in rows
        for seed, folder in zip(seeds, folders, strict=True)
    }
    return scored, rows


def fall_back(output: Path, scored: Scored, rows: list[str], seeds: list[int]) -> list[str]:
    """Add a row `<row>_else_alone` to `scored` for each row with daily vectors; returns the names of the new rows."""
    added = []
    for row in (name for name in rows if name.endswith("_daily")):
        added.append(f"{row}_else_{ALONE}")
        for seed in seeds:
            own, base = scored[row, seed], scored[ALONE, seed]
            known = has_daily_vector(output, seed, own)
            assert own.probability is not None and base.probability is not None
            scored[added[-1], seed] = dataclasses.replace(
                own,
                score=np.where(known, own.score, base.score),
                probability=np.where(known, own.probability, base.probability),
            )
    return added


def has_daily_vector(output: Path, seed: int, scored: Predictions) -> np.ndarray:
    """Mask [n] of the exposures that have a user vector of the night before."""
    store = EmbeddingStore.open(output / f"seed-{seed}" / "users" / "daily")
    return store.snapshot().content_hashes(exposure_keys(scored.user_id, scored.position))[1]


def restrict(scored: Scored, rows: np.ndarray) -> Scored:
    """The predictions of some of the exposures; rows: bool [n]."""
    arrays = [field.name for field in dataclasses.fields(Predictions)]
    return {
        key: Predictions(**{name: None if (x := getattr(one, name)) is None else x[rows] for name in arrays})
        for key, one in scored.items()
    }


def main(argv: list[str] | None = None) -> int:
    """Print the tables of the parts and write `three_stages.json`."""
    parser = experiment_parser(__doc__, "stages", seeds=[0, 1, 2])
    parser.add_argument("--splits", nargs="+", default=["valid", "test"])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--fallback", action="store_true")
    parser.add_argument("--covered", action="store_true")
    options = parser.parse_args(argv)
    found = {}
    for split in options.splits:
        scored, rows = read_rows(options.output, options.seeds, split)
        if options.fallback:
            rows += fall_back(options.output, scored, rows, options.seeds)
        parts = {split: scored}
        if options.covered:  # the mask depends on the histories only, so it is the same for all seeds
            known = has_daily_vector(options.output, options.seeds[0], scored[rows[0], options.seeds[0]])
            parts |= {f"{split} covered": restrict(scored, known), f"{split} uncovered": restrict(scored, ~known)}
        for name, part in parts.items():
            found[name] = summarise(part, rows, options.seeds, options.draws)
            exposures = part[rows[0], options.seeds[0]].label.size
            print(f"{name}, {exposures:,} exposures, seeds {options.seeds}:\n\n{markdown(found[name], rows[0])}\n")
    (options.output / "three_stages.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
