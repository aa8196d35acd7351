"""Comparison of retrieval models: Recall@K and NDCG@K with intervals over users, for one or more seeds per model.

Reads the targets' ranks that `hllm evaluate` and `hllm retrieval` write. An estimate is the mean over seeds of the mean
over targets. Its interval is computed by resampling users, each with all targets and seeds, because most of the
uncertainty comes from the users, not the seeds. The standard deviation over seeds is reported in addition.

Legend: X targets, U users, R seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from hllm_torchrec.common.arrays import Doubles, Ints
from hllm_torchrec.data.validation import error_location
from hllm_torchrec.metrics.bootstrap import percentile_interval

DRAWS = 2000
"""Resamples of the users."""


@dataclass(frozen=True)
class TargetRanks:
    """Ranks of targets, sorted by (user_id, position); each array is [X]; rank 1 is the best."""

    user_id: Ints
    position: Ints
    rank: Ints


@dataclass(frozen=True)
class MetricEstimate:
    """Estimate of a metric: mean over seeds, 95% interval over users, standard deviation over seeds.

    deviation: None for one seed, and for differences.
    """

    mean: float
    low: float
    high: float
    deviation: float | None


def read_target_ranks(directory: Path) -> TargetRanks:
    """Read the ranks in a directory of parts.

    Raises:
        ValueError: the directory has no parts, a part cannot be read, or a target occurs twice.
    """
    if not any(directory.glob("part-*.parquet")):
        raise ValueError(f"{directory}: no part-*.parquet: `hllm evaluate` and `hllm retrieval` write them")
    with error_location(directory, "remove it and evaluate again"):
        table = pq.read_table(directory, columns=["user_id", "position", "rank"])
        user, position, rank = (table[name].cast("int64").to_numpy() for name in ("user_id", "position", "rank"))
    order = np.lexsort((position, user))
    user, position, rank = user[order], position[order], rank[order]
    if ((np.diff(user) == 0) & (np.diff(position) == 0)).any():
        raise ValueError(f"{directory}: a target occurs twice: parts of two runs; remove them and evaluate again")
    return TargetRanks(user, position, rank)


def gains(rank: Ints, metric: str) -> Doubles:
    """Contribution of each target to `recall@K` or `ndcg@K`, [X].

    With one relevant item per target, recall@K is 1 and ndcg@K is 1 / log2(rank + 1) if rank <= K, else 0.

    Raises:
        ValueError: the metric is not one of these.
    """
    name, _, cut = metric.partition("@")
    if name not in ("recall", "ndcg") or not cut.isdigit() or int(cut) < 1:
        raise ValueError(f"metric {metric!r}: must be recall@K or ndcg@K with K of at least 1")
    hit = rank <= int(cut)
    return hit.astype(np.float64) if name == "recall" else hit / np.log2(rank + 1.0)


def compare_models(
    models: Mapping[str, Sequence[Path]],
    metrics: Sequence[str],
    reference: str | None = None,
) -> dict[str, dict[str, dict[str, MetricEstimate]]]:
    """Estimates of every model and its paired differences from the reference, on the same targets and users.

    Args:
        models: name -> directories of ranks, one per seed.
        metrics: `recall@K`, `ndcg@K`.
        reference: model with which the others are compared; None: the first model.

    Returns:
        model -> {"value": {metric: MetricEstimate}, "difference": {metric: MetricEstimate}}; the reference has no
        differences.

    Raises:
        ValueError: a model's targets differ from those of the reference, or a directory is invalid.
    """
    base = next(iter(models)) if reference is None else reference
    read = {name: [read_target_ranks(path) for path in paths] for name, paths in models.items()}
    first = read[base][0]
    for name, runs in read.items():
        for run, path in zip(runs, models[name], strict=True):
            if not (np.array_equal(run.user_id, first.user_id) and np.array_equal(run.position, first.position)):
                raise ValueError(f"{path}: its targets differ from {models[base][0]}'s: evaluate both on the same part")
    users = np.unique(first.user_id, return_inverse=True)[1]
    # The same resamples for every model. Drawing U of U users with replacement gives multinomial counts.
    count = int(users.max()) + 1
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(np.float64)
    found: dict[str, dict[str, dict[str, MetricEstimate]]] = {name: {"value": {}, "difference": {}} for name in models}
    for metric in metrics:
        per_target = {name: np.stack([gains(run.rank, metric) for run in runs]) for name, runs in read.items()}
        for name, rows in per_target.items():
            found[name]["value"][metric] = _figure(rows, users, weights)
            if name != base:
                difference = rows.mean(0, keepdims=True) - per_target[base].mean(0, keepdims=True)
                found[name]["difference"][metric] = _figure(difference, users, weights)
    return found


def _figure(rows: Doubles, users: Ints, weights: Doubles) -> MetricEstimate:
    """Estimate from contributions `rows` [R, X]; users: [X] user index per target; weights: [DRAWS, U] resamples."""
    # A resample's mean over targets is a ratio of sums over users, since users have different numbers of targets.
    of_users = np.bincount(users, rows.mean(0))
    low, high = percentile_interval((weights @ of_users) / (weights @ np.bincount(users).astype(np.float64)))
    deviation = float(rows.mean(1).std(ddof=1)) if len(rows) > 1 else None
    return MetricEstimate(float(rows.mean()), low, high, deviation)


def markdown(results: Mapping[str, Mapping[str, Mapping[str, MetricEstimate]]]) -> str:
    """The estimates as a Markdown table: a row per model, a column per metric."""
    metrics = list(next(iter(results.values()))["value"])
    lines = [f"| model | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    for name, figures in results.items():
        cells = [f"{f.mean:.4f} [{f.low:.4f}, {f.high:.4f}]" for f in figures["value"].values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown_of_differences(
    results: Mapping[str, Mapping[str, Mapping[str, Mapping[str, MetricEstimate]]]], metric: str
) -> str:
    """Paired differences in one metric as a Markdown table: a row per model, a column per reference.

    results: reference -> result of `compare_models` with it.
    """
    lines = [f"| {metric} | {' | '.join(f'minus {name}' for name in results)} |", "|---" * (len(results) + 1) + "|"]
    for model in next(iter(results.values())):
        cells = []
        for comparison in results.values():
            f = comparison[model]["difference"].get(metric)
            cells.append("" if f is None else f"{f.mean:+.4f} [{f.low:+.4f}, {f.high:+.4f}]")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)
