"""Initial values for the rows of ids that were added after a checkpoint was saved (`features.new_rows`)."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.nn.functional import normalize

from hllm_torchrec.checkpoint.growth import saved_table_rows
from hllm_torchrec.checkpoint.safe_reader import SafeReader
from hllm_torchrec.checkpoint.state import is_under
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.distributed.coordination import run_on_rank_zero
from hllm_torchrec.embedding.tables import local_shards
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.run_vocabulary import TABLES

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

NEIGHBORS = 10
"""Number of known items whose mean row initializes the row of a new item."""
_AT_ONCE = 4096
_SIMILARITIES = 1 << 26


@torch.no_grad()
def fill_new_rows(
    experiment: Experiment,
    checkpoint: Path,
    skip: Collection[str] = (),
    averages: Mapping[str, Tensor] | None = None,
) -> None:
    """Initialize the rows that a loaded checkpoint does not have, by the method `features.new_rows`. Collective.

    Args:
        skip: prefixes of weights that were not loaded.
        averages: parameter name -> loaded moving average, in which the same rows are initialized.
    """
    kind = experiment.config.features.new_rows
    if kind == "noise":
        return
    saved = run_on_rank_zero(lambda: saved_table_rows(SafeReader(checkpoint).read_tensors()))
    state = experiment.model.state_dict()
    for name, rows in experiment.batch_spec.tables(experiment.dataset).items():
        key, known = f"{TABLES}{name}.weight", saved.get(name, rows)
        if known >= rows or is_under(key, skip):
            continue
        sources = np.zeros((rows - known, 1), np.int64)  # the unknown id
        if kind == "neighbors" and name == "item_id":
            sources = nearest_known(experiment, known)
        # A rank has only some tables, but all ranks must take part in `read_rows`.
        tables = [table for table in (state.get(key), (averages or {}).get(key)) if table is not None]
        for first in range(0, rows - known, _AT_ONCE):
            ids = sources[first : first + _AT_ONCE]
            unique, place = np.unique(ids, return_inverse=True)
            values = read_rows(state.get(key), unique, experiment.hllm.features.width, experiment.device)
            for table in tables:
                write_rows(table, known + first, values[torch.from_numpy(place.reshape(ids.shape))].mean(1))


def read_rows(table: Any, ids: NDArray[np.int64], width: int, device: torch.device) -> Tensor:
    """Rows [n, width] float32 of a table on every rank; table: this rank's part, or None. Collective."""
    rows = torch.zeros(len(ids), width, device=device)
    if table is not None:
        wanted = torch.from_numpy(ids).to(device)
        for values, start, column in local_shards(table):
            here = (wanted >= start) & (wanted < start + len(values))
            rows[here, column : column + values.shape[1]] = values[wanted[here] - start].float()
    # A replicated table is complete on every rank, so its rows must not be summed.
    if table is None or isinstance(table, ShardedTensor):
        dist.all_reduce(rows)
    return rows


def write_rows(table: Any, first: int, rows: Tensor) -> None:
    """Write rows [n, width] into this rank's part of a table, from row `first` on."""
    for values, start, column in local_shards(table):
        low, high = max(first, start), min(first + len(rows), start + len(values))
        if low < high:
            values[low - start : high - start] = rows[low - first : high - first, column : column + values.shape[1]]


def nearest_known(experiment: Experiment, known: int) -> NDArray[np.int64]:
    """Ids [new items, up to NEIGHBORS] of the items below `known` that are nearest to each item from `known` on.

    The distance is the cosine of the Item LLM's embeddings, or in an ID-only model of the items' bags of features. An
    item without a common feature value is not a neighbor; id 0 (unknown) is used instead. Collective.
    """
    number, at_once = min(NEIGHBORS, known - 1), max(1, _SIMILARITIES // known)
    embedded = experiment.encode_catalogue()
    nearest = []
    if embedded is not None:
        vectors = normalize(embedded.float(), dim=-1)
        blocks = (block @ vectors[1:known].T for block in vectors[known:].split(at_once))
        nearest = [block.topk(number).indices.cpu().numpy() for block in blocks]
    else:
        bags = feature_bags(experiment.dataset, experiment.config.data.item_features)
        for first in range(known, bags.shape[0], at_once):
            block = (bags[first : first + at_once] @ bags[1:known].T).toarray()
            rows = np.argsort(-block, axis=1, kind="stable")[:, :number]
            nearest.append(np.where(np.take_along_axis(block, rows, axis=1) > 0, rows, -1))
    return np.concatenate(nearest).astype(np.int64) + 1  # column 0 is item 1


def feature_bags(dataset: Dataset, names: Collection[str]) -> "csr_matrix":
    """Sparse [N, values of all features] bags of the items' values, weighted by 1 / sqrt(frequency), with unit rows."""
    from scipy.sparse import csr_matrix, hstack  # the import is slow, and most runs do not need it

    parts = []
    for name in names:
        values, offsets = dataset.feature_ids("item", name)
        shape = dataset.num_items, dataset.feature_size("item", name)
        frequency = np.maximum(np.bincount(values, minlength=shape[1]), 1)
        parts.append(csr_matrix((1 / np.sqrt(frequency[values]), values, offsets), shape=shape))
    bags = hstack(parts, format="csr")
    length = np.sqrt(np.asarray(bags.multiply(bags).sum(axis=1))).ravel()
    return csr_matrix(bags.multiply(1 / np.maximum(length, 1e-12)[:, None]))
