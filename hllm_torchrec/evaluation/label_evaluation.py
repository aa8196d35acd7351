"""Evaluation of one label: the first label, or the label of an additional binary task.

The rows are added once, in batches (pass one): they are sorted by score, also per slice, and the metrics of
probabilities are accumulated. The columns that influences need are stored. `metrics` then computes each row's influence
on the AUC and groups the rows by user (pass two). The memory is bounded for any number of rows.
"""

import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hllm_torchrec.common.terminal import say
from hllm_torchrec.distributed.array_collectives import gather_objects, group_rank, in_step
from hllm_torchrec.evaluation.metrics_schema import bounds, curves_block, model_block, paired_block, slice_block
from hllm_torchrec.evaluation.prediction_layout import PredictionModel
from hllm_torchrec.evaluation.prediction_rows import PredictionRows
from hllm_torchrec.evaluation.row_batch import RowBatch
from hllm_torchrec.evaluation.row_slices import DAY_SLICE, HISTORY_SLICES, ITEM_SLICES
from hllm_torchrec.evaluation.spooled_rows import Spool, SpooledRows
from hllm_torchrec.metrics.bootstrap import percentile_interval, user_bootstrap
from hllm_torchrec.metrics.delong import PairedSums, influence
from hllm_torchrec.metrics.exact_auc import Placements, RankStatistics, rank_statistics
from hllm_torchrec.metrics.probabilities import ProbabilitySums, ReliabilityCurve, reliability
from hllm_torchrec.metrics.registry import PROBABILITY_METRICS
from hllm_torchrec.metrics.score_chunks import MemoryPool, SortedChunks
from hllm_torchrec.metrics.user_statistics import UserBuckets, order_keys, record_type

MAX_SLICES = 400
"""Maximum number of slices per column."""

BOOTSTRAP_ROWS = 5_000_000
"""Maximum number of rows for the bootstrap over users, which needs all of them in memory on every rank."""


@dataclass
class _SortedScores:
    """Result of pass one on this rank."""

    overall: dict[str, SortedChunks]
    probability: dict[str, tuple[ProbabilitySums, SortedChunks]]
    slices: dict[tuple[int, str], dict[str, SortedChunks]] = field(default_factory=dict)
    """(column, slice) → model → the slice's sorted scores."""
    left_out: set[int] = field(default_factory=set)
    """Columns of automatic slices with too many values, which are left out: days, if predictions cover years."""
    keys: int = 0
    """Sum of the rows' keys modulo 2^64, which does not depend on their order: a fingerprint of the exposures."""


class LabelEvaluation:
    """Metrics of all models on one label.

    Args:
        source: label, models and columns; the rows are passed to `add`.
        spool: limits of memory. Sorting uses the whole memory, as if there were no other label.
        kept: the rows that will be added, if they are already stored; None: `add` stores them.
        draws, seed: resamples of the bootstrap over users, and their seed.
    """

    def __init__(
        self,
        source: PredictionRows,
        spool: Spool,
        kept: SpooledRows | None = None,
        *,
        draws: int = 0,
        seed: int = 0,
    ) -> None:
        self.source, self.spool, self.draws, self.seed = source, spool, draws, seed
        self.pool = MemoryPool(spool.memory, Path(tempfile.mkdtemp(dir=spool.folder)))
        self.names = [model.name for model in source.models]
        # One model without users needs no influences: pass one gives its AUC and DeLong interval.
        self._has_second = source.has_users or len(self.names) > 1
        self._kept, self._keeps = kept or SpooledRows(spool), self._has_second and kept is None
        self._ordered = self._no_scores()

    def _no_scores(self) -> _SortedScores:
        models, weighted = self.source.models, self.source.weighted
        ordered = _SortedScores({model.name: self._new_runs(model) for model in models}, {})
        for model in models:
            if model.probability:
                # The reliability curve needs the probabilities sorted: if the scores are the probabilities, share one
                # sorted column instead of sorting twice. Float64 only, the type that probabilities are sorted in.
                same = model.probability == model.score and self.source.score_type(model) == np.float64
                runs = ordered.overall[model.name] if same else SortedChunks(self.pool, np.dtype(np.float64), weighted)
                ordered.probability[model.name] = ProbabilitySums(PROBABILITY_METRICS), runs
        return ordered

    def add(self, start: int, batch: RowBatch) -> None:
        """Add rows; start: see `ReadRows`.

        Raises:
            ValueError: a column of slices has too many values.
        """
        ordered = self._ordered
        ordered.keys = (ordered.keys + int(batch.keys.sum(dtype=np.uint64))) % 2**64
        for name, scores in batch.scores.items():
            ordered.overall[name].add(scores, batch.is_positive, batch.weights)
        for name, values in batch.probabilities.items():
            sums, runs = ordered.probability[name]
            sums.add(batch.is_positive, values, batch.weights)
            if runs is not ordered.overall[name]:
                runs.add(values, batch.is_positive, batch.weights)
        self._add_slices(ordered, batch)
        if self._keeps:
            # only the columns that pass two needs
            needed = RowBatch(batch.is_positive, batch.weights, batch.scores, {}, batch.users, batch.keys)
            self._kept.add(start, needed)

    def metrics(self) -> dict[str, Any]:
        """Return the label's part of `metrics.json` after all rows were added, and release their memory. Collective."""
        try:
            return self._metrics()
        finally:
            self._kept.release()
            self._ordered = self._no_scores()
            self.spool.spilled += self.pool.spilled
            shutil.rmtree(self.pool.folder)

    def _metrics(self) -> dict[str, Any]:
        ordered = self._ordered
        second = self._has_second
        measured = {name: rank_statistics(runs, keep=second) for name, runs in ordered.overall.items()}
        statistics = {name: found for name, (found, _) in measured.items()}
        slices = self._slices(ordered)
        probability = {name: self._probability(ordered, name) for name in self.names}
        pairs = PairedSums(list(statistics.values()))
        users, drawn = None, {}
        if second:
            placements = {name: table for name, (_, table) in measured.items()}
            buckets = self._influences(statistics, placements, pairs)
            users = buckets.statistics(len(self.names)) if self.source.has_users else None
            drawn = self._bootstrap(buckets) if self.source.has_users else {}
        reference = self.names[0]
        models, paired = {}, {}
        for place, name in enumerate(self.names):
            models[name] = model_block(statistics[name], probability[name][0], users, place)
            models[name] |= _percentiles(drawn.get(name)) | {"slices": slices[name]}
            if place:
                paired[name] = paired_block(pairs.delong(place), users, place)
                paired[name] |= _percentiles(drawn[name] - drawn[reference] if drawn else None)
        return {
            "reference": reference,
            "rows": statistics[reference].rows,
            "rows_without_weight": self.source.rows - statistics[reference].rows,
            "users": users.users if users else None,
            **({"rows_without_user": users.rows_without_user} if users and users.rows_without_user else {}),
            "exposures": f"{sum(gather_objects(ordered.keys)) % 2**64:016x}",
            "weighted": self.source.weighted,
            "models": models,
            "paired": paired,
            "curves": {name: curves_block(statistics[name], probability[name][1]) for name in self.names},
            "bootstrap": {
                "draws": self.draws if drawn else 0,
                "seed": self.seed,
                "left_out": self._no_bootstrap(),
            },
        }

    def _new_runs(self, model: PredictionModel) -> SortedChunks:
        return SortedChunks(self.pool, self.source.score_type(model), self.source.weighted)

    def _add_slices(self, ordered: _SortedScores, batch: RowBatch) -> None:
        for column, (names, codes) in enumerate(batch.slices):
            if column in ordered.left_out:
                continue
            # Group the rows by slice with one sort; code -1 (no slice) sorts before cuts[0] and is skipped.
            order = np.argsort(codes, kind="stable")
            cuts = np.searchsorted(codes[order], np.arange(len(names) + 1))
            for name, low, high in zip(names, cuts, cuts[1:]):
                runs = ordered.slices.setdefault((column, name), {})
                for model in self.source.models:
                    if model.name not in runs:
                        runs[model.name] = self._new_runs(model)
                    rows = order[low:high]
                    weights = None if batch.weights is None else batch.weights[rows]
                    runs[model.name].add(batch.scores[model.name][rows], batch.is_positive[rows], weights)
            if sum(key[0] == column for key in ordered.slices) > MAX_SLICES:
                if names[0].startswith(DAY_SLICE):  # not requested by the user
                    ordered.left_out.add(column)
                    continue
                example = names[0].partition("=")[0]
                raise ValueError(
                    f"the column of {example!r} has more than {MAX_SLICES} values; slices are for columns with few "
                    "values: write a column with coarser values"
                )

    def _slices(self, ordered: _SortedScores) -> dict[str, dict[str, Any]]:
        """model → slice → its size and AUC, for the slices of all ranks. Collective."""
        # Slices come from the data, so ranks may have different ones: agree on the list and its order first, because
        # `rank_statistics` is collective.
        gathered = gather_objects((list(ordered.slices), ordered.left_out))
        left_out = set().union(*(columns for _, columns in gathered))
        found = sorted({key for keys, _ in gathered for key in keys if key[0] not in left_out}, key=_place)
        if left_out and group_rank() == 0:
            say(f"caution: more than {MAX_SLICES} days: there are no slices by day")
        blocks: dict[str, dict[str, Any]] = {name: {} for name in self.names}
        for column, name in found:
            for model in self.source.models:
                runs = ordered.slices.get((column, name), {}).get(model.name) or self._new_runs(model)
                blocks[model.name][name] = slice_block(rank_statistics(runs)[0])
        return blocks

    def _probability(self, ordered: _SortedScores, name: str) -> tuple[dict[str, float], ReliabilityCurve | None]:
        if name not in ordered.probability:
            return {}, None
        sums, runs = ordered.probability[name]
        curve, error = reliability(runs)
        return sums.values(error), curve

    def _influences(
        self, statistics: Mapping[str, RankStatistics], placements: Mapping[str, Placements], pairs: PairedSums
    ) -> UserBuckets:
        """Pass two: group the rows' influences on each AUC by user, and add them to `pairs`. Collective."""
        buckets = UserBuckets(self.pool, len(self.names), self.source.rows)
        # `look_up` is collective and ranks have different numbers of batches: a rank that has finished takes part
        # with empty ones.
        empty = self._empty()
        for batch in in_step(self._kept.joined(self.spool.influence_rows)):
            batch = batch or empty
            influences = np.stack(
                [
                    influence(
                        placements[name].look_up(batch.scores[name], batch.is_positive),
                        batch.is_positive,
                        batch.weights,
                        found,
                    )
                    for name, found in statistics.items()
                ]
            )
            pairs.add(batch.is_positive, influences)
            if self.source.has_users:
                buckets.add(_records(batch, influences))
        return buckets

    def _empty(self) -> RowBatch:
        """An empty batch, for a rank that has finished before the others."""
        scores = {model.name: np.empty(0, self.source.score_type(model)) for model in self.source.models}
        weights = np.empty(0) if self.source.weighted else None
        users = np.empty(0, np.int64) if self.source.has_users else None
        return RowBatch(np.empty(0, bool), weights, scores, {}, users, np.empty(0, np.uint64), [])

    def _no_bootstrap(self) -> str | None:
        """Reason why a requested bootstrap is not possible, or None."""
        if not (self.draws and self.source.rows):
            return None
        if not self.source.has_users:
            return "the rows have no users"
        if self.source.weighted:
            return "rows are weighted"
        if self.source.rows > BOOTSTRAP_ROWS:
            return f"more than {BOOTSTRAP_ROWS:,} rows"
        return None

    def _bootstrap(self, buckets: UserBuckets) -> dict[str, np.ndarray]:
        """model → AUCs of resampled users; empty if not requested or not possible. Collective."""
        if not (self.draws and self.source.rows) or self._no_bootstrap():
            return {}
        # Every rank gets all rows and draws from the same seed, so the result is equal without a broadcast.
        records = np.concatenate([part for parts in gather_objects(list(buckets)) for part in parts])
        # Places among the distinct scores, which float64 holds exactly: only the order counts.
        places = [np.unique(column, return_inverse=True)[1] for column in records["score"].T]
        scores = dict(zip(self.names, places, strict=True))
        labels = records["positive"]
        return user_bootstrap(labels, scores, records["user"], self.draws, self.seed)


def _records(batch: RowBatch, influences: np.ndarray) -> np.ndarray:
    records = np.empty(len(batch.is_positive), record_type(len(influences)))
    records["user"], records["positive"] = batch.users, batch.is_positive
    records["weight"] = 1.0 if batch.weights is None else batch.weights
    for place, scores in enumerate(batch.scores.values()):
        records["score"][:, place] = order_keys(scores)
        records["influence"][:, place] = influences[place]
    return records


def _percentiles(drawn: np.ndarray | None) -> dict[str, float | None]:
    return bounds("bootstrap", *((math.nan, math.nan) if drawn is None else percentile_interval(drawn)))


def _place(key: tuple[int, str]) -> tuple[int, int, str]:
    """Sort key of slices: by column, then in the order of `HISTORY_SLICES` or `ITEM_SLICES`, then by name."""
    column, name = key
    ordered = (*HISTORY_SLICES, *ITEM_SLICES)
    return column, ordered.index(name) if name in ordered else -1, name
