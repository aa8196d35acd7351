"""Three simple retrieval baselines, evaluated by the same code as the models.

Each scores the catalogue for a user by a sum over the history, s = sum_k w_k M[h_k] + backoff:

    popularity  w = 0, backoff = the item's number of training events
    ease        w = 1, M = I - P / diag(P) (column j divided by P_jj) with P = (A'A + l2 I)^-1, A [R, N] the binary
                matrix of the items of each training user (EASE, arXiv 1905.03375)
    markov      w_k = decay^(age of event k), M[i, j] = F[i, j] / (events of i + shrinkage) / (events of j)^damping,
                F[i, j] = sum over g of gap_decay^(g - 1) * (how often j came g events after i), for g up to `window`
                and weights of at least 1e-3; backoff = 1e-3 * the item's share of the training events

Settings are selected from small grids by NDCG@10 on the validation part; the test part is scored once, with the
selected settings. Only training events are fitted; the history of a request contains all earlier events of any part.

Legend: N rows of an item table (0 is the unknown item), R rows (users), x exposures, S the events visible to them.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse as sp
import torch

from hllm_torchrec.baselines.settings import RetrievalBaselinesConfig
from hllm_torchrec.common.arrays import Floats, Ints
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.histories import Histories, rank_row_groups, read_histories
from hllm_torchrec.data.jagged_arrays import concat_ranges, offsets_from_lengths
from hllm_torchrec.evaluation.scoring import metrics_of_target_ranks
from hllm_torchrec.metrics.retrieval_metrics import target_ranks

CHOSEN_BY = 10
"""K of the NDCG@K on the validation part that selects the settings."""
MAX_EASE_ITEMS = 30_000
"""Maximum N for EASE, which inverts an N x N matrix: 7 GB in float64 at this size."""
SCORE_CHUNK = 2**25
"""Number of scores in memory at a time: 128 MiB."""
NO_ITEMS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class ItemToItem:
    """Fitted baseline: s = sum_k decay^(age_k) matrix[h_k] + backoff, over the last `window` events (None: all).

    matrix: [N, N], dense or sparse, or None; backoff: float32 [N].
    """

    matrix: Any
    backoff: Floats
    decay: float = 1.0
    window: int | None = None

    def scores(self, histories: Histories, rows: Ints) -> Floats:
        """Scores [x, N] for the exposures `rows` [x] of `histories`."""
        if self.matrix is None:
            return np.broadcast_to(self.backoff, (rows.size, self.backoff.size)).copy()
        items, offsets = seen_items(histories, rows)
        weights = self._weights(offsets)
        history = sp.csr_matrix((weights, items, offsets), shape=(rows.size, self.backoff.size))
        summed = history @ self.matrix
        dense: Floats = (summed.toarray() if sp.issparse(summed) else summed).astype(np.float32, copy=False)
        return dense + self.backoff

    def _weights(self, offsets: Ints) -> Floats:
        """Weights [S] of the visible events: decay ** (number of later visible events); 0 before the last `window`."""
        # Index of the exposure's last visible event minus the index of the event itself.
        age = np.repeat(offsets[1:], np.diff(offsets)) - 1 - np.arange(offsets[-1])
        inside = np.ones_like(age, dtype=bool) if self.window is None else age < self.window
        return np.where(inside, np.power(self.decay, age, dtype=np.float64), 0).astype(np.float32)


def seen_items(histories: Histories, rows: Ints) -> tuple[Ints, Ints]:
    """(items [S], offsets [x + 1]) visible to each of the exposures `rows` [x], oldest first."""
    events = histories.exposures[rows]
    counts = histories.seen[events]
    start = histories.offsets[histories.row_of_event[events]]
    return histories.item_ids[concat_ranges(start, counts)], offsets_from_lengths(counts)


def fit_ease(train: Histories, items: int, l2: float) -> ItemToItem:
    """Closed form of EASE, computed in float64.

    Raises:
        ValueError: the catalogue is too large for an N x N matrix.
    """
    if items > MAX_EASE_ITEMS:
        raise ValueError(
            f"ease: the catalogue has {items - 1:,} items; EASE inverts an items x items matrix and supports at most "
            f"{MAX_EASE_ITEMS:,}: leave EASE out with --only popularity markov"
        )
    users = (np.ones(train.item_ids.size), (train.row_of_event, train.item_ids))
    x = sp.csr_matrix(users, shape=(train.user_ids.size, items))
    x.data[:] = 1.0  # binary: repeated items of a user count once
    gram = (x.T @ x).toarray()
    gram[np.diag_indices(items)] += l2
    inverse = scipy.linalg.inv(gram, overwrite_a=True, check_finite=False)
    # B_ij = -P_ij / P_jj off the diagonal; a zero diagonal prevents an item from predicting itself.
    weights = -inverse / np.diag(inverse)
    weights[np.diag_indices(items)] = 0.0
    return ItemToItem(weights.astype(np.float32), np.zeros(items, np.float32))


def fit_markov(
    train: Histories, items: int, decay: float, gap_decay: float, damping: float, shrinkage: float, window: int
) -> ItemToItem:
    """Markov chain with decaying weights of followers and of the history; the backoff is popularity, to break ties."""
    followers = sp.csr_matrix((items, items))
    for gap in range(1, window + 1):
        weight = gap_decay ** (gap - 1) if gap > 1 else 1.0
        if weight < 1e-3:
            break
        # Pairs of events `gap` apart are consecutive in the packed arrays; keep those within one user.
        same = train.row_of_event[gap:] == train.row_of_event[:-gap]
        pairs = (train.item_ids[:-gap][same], train.item_ids[gap:][same])
        followers = followers + sp.csr_matrix((np.full(pairs[0].size, weight), pairs), shape=(items, items))
    events = _counts(train, items)
    of_leader = sp.diags(1.0 / (events + shrinkage))
    of_follower = sp.diags(np.power(np.maximum(events, 1.0), -damping))
    backoff = events / max(float(events.sum()), 1.0) * 1e-3  # breaks ties where no transition was seen
    return ItemToItem((of_leader @ followers @ of_follower).tocsr(), backoff.astype(np.float32), decay, window)


def _counts(train: Histories, items: int) -> Floats:
    return np.bincount(train.item_ids, minlength=items).astype(np.float32)


def candidate_settings(name: str, config: RetrievalBaselinesConfig) -> list[dict[str, float]]:
    """The combinations of settings that are evaluated for a baseline."""
    if name == "popularity":
        return [{}]
    if name == "ease":
        return [{"l2": l2} for l2 in config.ease_l2]
    grid = itertools.product(config.markov_decay, config.markov_gap_decay, config.markov_damping)
    return [{"decay": d, "gap_decay": g, "damping": p} for d, g, p in grid]


def fit(name: str, train: Histories, items: int, config: RetrievalBaselinesConfig, **settings: float) -> ItemToItem:
    """Fit a baseline by name to the training part."""
    if name == "popularity":
        return ItemToItem(None, _counts(train, items))
    if name == "ease":
        return fit_ease(train, items, **settings)
    return fit_markov(train, items, shrinkage=config.markov_shrinkage, window=config.window, **settings)


def rank_baseline_targets(
    model: ItemToItem, histories: Histories, config: RetrievalBaselinesConfig, excluded: Ints
) -> tuple[dict[str, Ints], int]:
    """Compute the rank of each target of this process's exposures among the candidates.

    Returns the columns user_id, position, item_id and rank, and the number of targets that were skipped because they
    see no event. Targets, candidates (without `excluded`) and columns are those of
    `evaluation.scoring.rank_catalogue_targets` for a model.
    """
    labels = histories.labels[histories.exposures]
    wanted = labels > 0 if config.positive_only else np.ones(labels.size, bool)
    visible = histories.seen[histories.exposures] > 0
    rows = np.flatnonzero(wanted & visible)
    ranks = [torch.empty(0, dtype=torch.int64)]
    # Scores are [rows, N]: as many rows at a time as fit into SCORE_CHUNK values.
    for part in _parts(rows, max(1, SCORE_CHUNK // model.backoff.size)):
        items, offsets = seen_items(histories, part)
        seen = (torch.from_numpy(items), torch.from_numpy(offsets)) if config.filter_seen else (None, None)
        targets = torch.from_numpy(histories.item_ids[histories.exposures[part]])
        scores = torch.from_numpy(model.scores(histories, part))
        target_scores = scores[torch.arange(len(targets)), targets]
        scores[:, excluded] = -torch.inf
        # An excluded target keeps its score, so that it has a rank.
        scores[torch.arange(len(targets)), targets] = target_scores
        ranks.append(target_ranks(scores, targets, seen_items_S=seen[0], seen_offsets=seen[1]))
    events = histories.exposures[rows]
    columns = {
        "user_id": histories.user_ids[histories.row_of_event[events]],
        "position": histories.position[events],
        "item_id": histories.item_ids[events],
        "rank": torch.cat(ranks).numpy(),
    }
    return columns, int((wanted & ~visible).sum())


def measure_baseline(
    model: ItemToItem, histories: Histories, config: RetrievalBaselinesConfig, excluded: Ints = NO_ITEMS
) -> dict[str, Any]:
    """Metrics of `rank_baseline_targets` over all ranks. Collective."""
    return metrics_of_target_ranks(*rank_baseline_targets(model, histories, config, excluded), config.ks)


def _parts(rows: Ints, size: int) -> Iterator[Ints]:
    yield from (rows[at : at + size] for at in range(0, rows.size, size))


def run_retrieval_baseline(
    name: str, dataset: Dataset, config: RetrievalBaselinesConfig, report: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Select settings on the validation part, then evaluate the test part once. Collective.

    Returns:
        Selected `settings`, `tried` (all settings with their validation NDCG), `valid` and `test` metrics, and
        `ranks`, this rank's columns of the test part.

    Raises:
        ValueError: a part is empty, or the catalogue is too large for EASE.
    """
    train = read_histories(dataset, dataset.row_groups("train"))
    parts = {split: read_histories(dataset, rank_row_groups(dataset, split)) for split in ("valid", "test")}
    key = f"ndcg@{CHOSEN_BY}"
    by_settings = []
    ks = tuple(dict.fromkeys((CHOSEN_BY, *config.ks)))
    for settings in candidate_settings(name, config):
        model = fit(name, train, dataset.num_items, config, **settings)
        found = measure_baseline(model, parts["valid"], dataclasses.replace(config, ks=ks), dataset.excluded_items)
        report(f"{name} {settings}: validation {key} {found[key] or 0:.4f}")
        by_settings.append((found[key] or 0.0, settings, found))
    _, chosen, valid = max(by_settings, key=lambda entry: entry[0])
    columns, skipped = rank_baseline_targets(
        fit(name, train, dataset.num_items, config, **chosen), parts["test"], config, dataset.excluded_items
    )
    test = metrics_of_target_ranks(columns, skipped, config.ks)
    tried = [{**settings, key: score} for score, settings, _ in by_settings]
    return {"settings": chosen, "tried": tried, "valid": valid, "test": test, "ranks": columns}
