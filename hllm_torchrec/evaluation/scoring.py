"""Scoring of each exposure of a split, on any number of ranks, and metrics of the scores during training.

The rows are written to `predictions/<split>/part-<rank>.parquet`. The offline job (`hllm evaluate`) reads these files,
so models, baselines and predictions of other programs are evaluated by the same code.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import closing
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hllm_torchrec.common.progress import progress
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.events import Sequences as UserSequences
from hllm_torchrec.data.loader import WINDOW_ROW_GROUPS, Loader
from hllm_torchrec.data.predictions import PredictionColumns, join_columns
from hllm_torchrec.distributed.collectives import global_sum, world_size
from hllm_torchrec.distributed.preemption import raise_if_preempted
from hllm_torchrec.evaluation.prediction_layout import find_tasks, label_of
from hllm_torchrec.evaluation.prediction_layout import task_columns as task_columns_of
from hllm_torchrec.metrics.approximate_auc import ScoreHistogram
from hllm_torchrec.metrics.auc import roc_auc
from hllm_torchrec.metrics.distributed_ranking import CatalogueShard, distributed_target_ranks, equal_chunks
from hllm_torchrec.metrics.gauc import gauc
from hllm_torchrec.metrics.retrieval_metrics import retrieval_metrics
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.tasks import Task
from hllm_torchrec.modules.jagged import offsets_from_lengths

RETRIEVAL_ROWS = 512
"""Number of exposures that all ranks together rank against the catalogue at a time."""


@torch.no_grad()
def score_split(experiment: Experiment, loader: Loader, *, show: bool = False) -> PredictionColumns:
    """Columns of the predictions format for this rank's exposures, with their scores. Collective."""
    hllm, model, schema = experiment.hllm, experiment.model.eval(), loader.dataset.schema
    cold = experiment.cold_items()
    weighted = schema.weighted or schema.sampled or loader.collator.draws is not None
    parts = []
    with progress(loader.steps(0), "evaluate", show) as bar, closing(loader.batches(0)) as batches:
        for batch in batches:
            raise_if_preempted()
            output = model(batch.to(experiment.device))
            columns = _columns(batch, output.logits.float().cpu().numpy(), cold)
            columns |= {"weight": batch.weights.numpy()} if weighted else {}
            if output.outputs is not None:
                assert batch.task_labels is not None
                columns |= task_columns(
                    hllm.tasks, hllm.task_scales.cpu(), batch.task_labels, output.outputs.float().cpu()
                )
            parts.append(columns)
            bar.update(1)
    model.train()
    return join_columns(parts)


def _columns(batch: HybridBatch, logits: NDArray, cold: NDArray[np.bool_]) -> PredictionColumns:
    piece_of_query = np.repeat(np.arange(batch.user_ids.numel()), np.diff(batch.query_offsets.numpy()))
    query = batch.target_query.numpy()
    items = batch.target_items.numpy()
    return {
        "user_id": batch.user_ids.numpy()[piece_of_query[query]],
        "position": batch.positions.numpy().astype(np.int32),
        "item_id": items,
        "timestamp": batch.query_times.numpy()[query],
        "label": batch.labels.numpy(),
        "score": logits.astype(np.float32),
        "probability": (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32),
        "history_length": batch.history_lengths.numpy().astype(np.int32),
        "item_is_cold": cold[items],
    }


def task_columns(tasks: Sequence[Task], scales: Tensor, task_labels: Tensor, outputs: Tensor) -> PredictionColumns:
    """Columns [X] with label, score and prediction of all tasks except the first, whose columns have no task name.

    The names of the columns end with the name of the task. Predicted numbers are in the label's unit.

    For X exposures, K tasks and O outputs of all tasks: task_labels: [X, K], NaN where not defined; outputs: [X, O];
    scales: [K, 2] center and scale of each task.
    """
    found: PredictionColumns = {}
    parts = outputs.split([task.outputs for task in tasks], dim=1)
    for k, (task, predicted) in enumerate(zip(tasks[1:], parts[1:], strict=True), start=1):
        labels = task.units(task_labels[:, k].numpy())
        kind = "probability" if task.is_binary else "prediction"
        found[f"label_{task.name}"] = labels.astype(np.float32)
        found[f"score_{task.name}"] = task.scores(predicted).numpy().astype(np.float32)
        found[f"{kind}_{task.name}"] = task.predictions(predicted, scales[k]).numpy().astype(np.float32)
    return found


def quick_metrics(columns: PredictionColumns, auc: Literal["exact", "approximate"] = "exact") -> dict[str, float]:
    """AUC, GAUC and log loss of a split during training, its number of rows, and `quick_task_metrics`. Collective.

    auc: "approximate" computes the AUC from a histogram of scores in one pass over the rows and adds `auc_error`, the
    maximum error of the AUC. All metrics are weighted if the rows have weights.
    """
    labels, scores = columns["label"], columns["score"]
    # Log loss of logits without overflow: log(1 + exp(-s)) for positives, log(1 + exp(s)) for negatives.
    signed = np.where(labels > 0.5, -scores, scores).astype(np.float64)
    losses, weights = np.logaddexp(0, signed), columns.get("weight")
    sums = [losses.sum(), float(labels.size), float(labels.size)]
    if weights is not None:
        sums = [losses @ weights.astype(np.float64), weights.sum(dtype=np.float64), float(labels.size)]
    total_loss, weight, rows = global_sum(torch.tensor(sums, dtype=torch.float64)).tolist()
    found = {"log_loss": total_loss / (weight or 1.0), "rows": rows} | quick_task_metrics(columns)
    if auc == "exact":
        total = roc_auc(labels, scores, weights)  # first, because it raises an error on every rank if a score is NaN
        return {"auc": total, "gauc": gauc(columns["user_id"], labels, scores, weights)} | found
    histogram = ScoreHistogram(weighted=weights is not None)
    given = (labels, scores) if weights is None else (labels, scores, weights)
    histogram.add(*map(torch.from_numpy, given))
    histogram.all_reduce()
    bounded = histogram.auc()
    within = gauc(columns["user_id"], labels, scores, weights)
    return {"auc": bounded.auc, "auc_error": bounded.error, "gauc": within} | found


def quick_task_metrics(columns: PredictionColumns) -> dict[str, float]:
    """Exact AUC of each additional binary task, and RMSE of each task that predicts numbers. Collective."""
    found = {}
    for task, kind in find_tasks(list(columns)).items():
        score, prediction = task_columns_of(task, kind)
        labels, weights = columns[label_of(task)], columns.get("weight", np.ones(len(columns["label"]), np.float32))
        known = ~np.isnan(labels)
        if kind == "binary":
            given = weights[known] if "weight" in columns else None
            found[f"auc_{task}"] = roc_auc(labels[known], columns[score][known], given)
            continue
        error = (columns[prediction] - labels)[known].astype(np.float64)
        sums = torch.tensor([weights[known] @ error**2, weights[known].sum()], dtype=torch.float64)
        total, weight = global_sum(sums).tolist()
        found[f"rmse_{task}"] = math.sqrt(total / weight) if weight else math.nan
    return found


@torch.no_grad()
def rank_catalogue_targets(
    model: nn.Module,
    loader: Loader,
    items: CatalogueShard,
    device: torch.device,
    show: bool = False,
    *,
    filter_seen: bool = True,
    positive_only: bool = True,
) -> tuple[PredictionColumns, int]:
    """Rank each target of this process in the complete catalogue. Collective.

    Scores are cosine similarities. Item 0 is not a candidate. Exposures without visible history are skipped.

    Args:
        items: this process's share of all items, in the space of the generative loss.
        filter_seen: the items of all events that the exposure may see (not only of those that the model reads) are
            not candidates.
        positive_only: exposures with label 0 are not targets; always so if the loader draws negatives.

    Returns:
        Columns `user_id`, `position`, `item_id` and `rank` (1 = best), int64 each; and the number of skipped
        exposures.
    """
    model.eval()
    unit = items.normalized()  # so that dot products with normalized outputs are cosine similarities
    at_once = max(1, RETRIEVAL_ROWS // world_size())
    parts, skipped = [torch.empty(4, 0, dtype=torch.int64)], 0
    histories = CompleteHistories(loader)
    with progress(loader.steps(0), "retrieve", show) as bar, closing(loader.batches(0)) as batches:
        for step, batch in enumerate(batches):
            raise_if_preempted()
            batch = batch.to(device)
            predicted = model(batch, want_next=True).next_items
            assert predicted is not None, "retrieval needs the generative loss"
            # Without history there is no position whose output could be compared with the items.
            visible = batch.query_visible[batch.target_query]
            only = positive_only or loader.collator.draws is not None  # drawn negatives are not targets
            wanted = batch.labels > 0 if only else torch.ones_like(batch.labels, dtype=torch.bool)
            skipped += int((wanted & (visible == 0)).sum())
            # All ranks need the same number of chunks, because ranking against the sharded catalogue is collective.
            for rows in equal_chunks(torch.nonzero(wanted & (visible > 0)).flatten(), at_once):
                seen, offsets = histories.seen_items(step, batch, rows) if filter_seen else (None, None)
                found = distributed_target_ranks(
                    torch.nn.functional.normalize(predicted[rows].float(), dim=-1),
                    unit,
                    batch.target_items[rows],
                    seen_items_S=seen,
                    seen_offsets=offsets,
                )
                users = batch.user_ids[_piece_of_query(batch)[batch.target_query[rows]]]
                parts.append(torch.stack([users, batch.positions[rows], batch.target_items[rows], found]).cpu())
            bar.update(1)
    model.train()
    columns = torch.cat(parts, dim=1).numpy()
    return dict(zip(("user_id", "position", "item_id", "rank"), columns, strict=True)), skipped


def metrics_of_target_ranks(
    columns: PredictionColumns, skipped: int, ks: tuple[int, ...]
) -> dict[str, float | int | None]:
    """Retrieval metrics of the targets of all ranks, and `without_history`, the number of skipped ones. Collective."""
    left_out = global_sum(torch.tensor([float(skipped)], dtype=torch.float64)).item()
    return retrieval_metrics(torch.from_numpy(columns["rank"]), ks) | {"without_history": int(left_out)}


def _piece_of_query(batch: HybridBatch) -> Tensor:
    """[Q] index of each query's piece."""
    counts = batch.query_offsets.diff()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)


class CompleteHistories:
    """Items of the users' complete sequences, of which the pieces of a loader may have only a part.

    The items that a user has seen do not depend on the model's inputs: neither on the length of pieces, nor on
    `data.history`, which may leave out disliked items.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader, self._cached = loader, OrderedDict[int, UserSequences]()
        self._by_second = loader.collator.spec.visibility == "second"

    def seen_items(self, step: int, batch: HybridBatch, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(items, offsets [n + 1]) of the items before each exposure in `rows` [n] of this rank's batch in a step."""
        pieces, loader = self._loader.pieces, self._loader
        # number [n]: index of each exposure's piece, whose row group and row have the user's complete sequence.
        number = loader.rank_batches(0)[loader.rank][step][
            _piece_of_query(batch)[batch.target_query[rows]].cpu().numpy()
        ]
        # Seen items are the earlier ones by the visibility rule: by second, or by position (leave one out).
        counts = (batch.history_lengths if self._by_second else batch.positions)[rows]
        parts = [np.empty(0, np.int64)]
        for group, row, count in zip(pieces.group[number], pieces.row[number], counts.tolist(), strict=True):
            sequences = self._sequences(int(group))
            start = int(sequences.offsets[row])
            parts.append(sequences.item_ids[start : start + count])
        return torch.from_numpy(np.concatenate(parts)).to(rows.device), offsets_from_lengths(counts)

    def _sequences(self, group: int) -> UserSequences:
        """Items of a row group; the last groups are cached, because a batch's pieces are in neighboring groups."""
        if group not in self._cached:
            self._cached[group] = self._loader.dataset.sequences([self._loader.groups[group]], ["item_ids"])
            if len(self._cached) > WINDOW_ROW_GROUPS:
                self._cached.popitem(last=False)
        return self._cached[group]
