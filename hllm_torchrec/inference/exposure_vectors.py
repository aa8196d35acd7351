"""Stage III: user vector of each exposure of a split, as available to a ranking model at the time of the exposure.

There are two modes. `daily`: the vector of the last nightly job, computed from events before the exposure's day (UTC),
as in the paper's Figure 4. `nearline`: the vector is computed from events of strictly earlier seconds. With
`data.feedback_delay`, both use only events that are visible at that time. An exposure without such an event of its user
has no user vector.

Legend: X exposures, D width of a user vector.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.data.events import Piece
from hllm_torchrec.data.histories import rank_row_groups
from hllm_torchrec.data.pieces import cut_into_pieces
from hllm_torchrec.data.visibility import visible_before
from hllm_torchrec.distributed.collectives import any_rank
from hllm_torchrec.inference import item_embedding
from hllm_torchrec.inference.user_embedder import DAY, UserEmbedder, nightly_request, open_embedder
from hllm_torchrec.models.experiment import Experiment

Mode = Literal["daily", "nearline"]


@dataclass(frozen=True)
class ExposureVectors:
    """A batch of exposures with user vectors. (user_id, position) identifies an exposure; position is its index in the
    user's complete sequence.

    user_id, position, item_id, timestamp (seconds UTC): int64 [X]; label: float32 [X]; users: float32
    [X, D], zeros where has_user (bool [X]) is false.
    """

    user_id: Ints
    position: Ints
    item_id: Ints
    timestamp: Ints
    label: NDArray[np.float32]
    users: Tensor
    has_user: Tensor


@dataclass(frozen=True)
class Coverage:
    """Number of exposures, and of exposures with a user vector."""

    exposures: int
    with_user: int

    @property
    def share(self) -> float:
        """Share of exposures with a user vector; 0 without exposures."""
        return self.with_user / max(self.exposures, 1)


@dataclass(frozen=True)
class VectorRequest:
    """Exposures (event indices of `source`) whose user vectors come from one `history` piece; None: no vectors.

    per_exposure: True if `history` contains these exposures, in order; False if it ends with a single exposure that
    represents all of them.
    """

    source: Piece
    exposures: Ints
    history: Piece | None
    per_exposure: bool

    @property
    def cost(self) -> int:
        """Number of events to encode, at least 1."""
        return 1 if self.history is None else len(self.history)


def exposure_vectors(experiment: Experiment, split: str, mode: Mode) -> Iterator[ExposureVectors]:
    """Yield this rank's exposures of a split in batches. Collective: every rank must exhaust the iterator.

    The vectors are computed with the experiment's current weights.

    Raises:
        ValueError: the split is empty.
    """
    limit, delay = experiment.config.data.max_history, experiment.config.data.feedback_delay
    requests_of = REQUESTS_BY_MODE[mode]
    rows = (experiment.dataset.sequences([group]) for group in rank_row_groups(experiment.dataset, split))
    requests = (unit for of_group in rows for piece in of_group.pieces() for unit in requests_of(piece, limit, delay))
    with open_embedder(experiment) as embedder:
        batches = _request_batches(requests, item_embedding.CATALOGUE_TOKENS)
        while any_rank((batch := next(batches, None)) is not None, experiment.device):
            yield embed_requests(embedder, batch or [])  # a finished rank still joins collectives


def daily_requests(piece: Piece, max_history: int, delay: int = 0) -> Iterator[VectorRequest]:
    """Group a user's exposures (of a complete sequence) by the number of events that the last nightly job before
    them may see; each group shares a vector. delay: seconds from an event until a job may see it."""
    exposures = piece.exposures
    midnights = piece.timestamps[exposures] // DAY * DAY
    seen = visible_before(piece.timestamps, midnights - delay)
    for count in np.unique(seen):
        history = nightly_request(piece, int(count), max_history, delay) if count else None
        yield VectorRequest(piece, exposures[seen == count], history, per_exposure=False)


def nearline_requests(piece: Piece, max_history: int, delay: int = 0) -> Iterator[VectorRequest]:
    """Group a user's exposures (of a complete sequence) by pieces of at most max_history events, as in training.

    delay: ignored, because the collator applies the delay to the pieces.
    """
    one, length = np.zeros(1, np.int64), np.array([len(piece)])
    cut = cut_into_pieces(one, one, length, np.array([piece.first_target]), max_history)
    exposures = piece.exposures
    for start, first, end in zip(cut.start.tolist(), cut.first_target.tolist(), cut.end.tolist(), strict=True):
        # Pieces overlap in their history, but each exposure is in the target range [first, end) of one piece only.
        inside = exposures[(exposures >= first) & (exposures < end)]
        if inside.size:
            yield VectorRequest(piece, inside, piece.cut(start, end, first), per_exposure=True)


REQUESTS_BY_MODE: dict[Mode, Callable[[Piece, int, int], Iterator[VectorRequest]]] = {
    "daily": daily_requests,
    "nearline": nearline_requests,
}


def embed_requests(embedder: UserEmbedder, requests: list[VectorRequest]) -> ExposureVectors:
    """Compute the vectors of all exposures of `requests` (which may be empty). Collective."""
    vectors, known = embedder([request.history for request in requests if request.history is not None])
    # rows: for each exposure the row of its vector in `vectors`; at: first row of the current request.
    rows, at = [np.empty(0, np.int64)], 0
    for request in requests:
        count = request.exposures.size
        if request.history is None:
            rows.append(np.full(count, -1))
        else:
            rows.append(at + (np.arange(count) if request.per_exposure else np.zeros(count, np.int64)))
            at += count if request.per_exposure else 1
    assert at == known.numel(), "every piece has the exposures of its request"
    row = torch.from_numpy(np.concatenate(rows)).to(vectors.device)
    has_user = torch.cat([known, known.new_zeros(1)])[row]  # row -1: no vector
    return ExposureVectors(
        user_id=_column(requests, lambda u: np.full(u.exposures.size, u.source.user_id), np.int64),
        position=_column(requests, lambda u: u.exposures + u.source.offset, np.int64),
        item_id=_column(requests, lambda u: u.source.item_ids[u.exposures], np.int64),
        timestamp=_column(requests, lambda u: u.source.timestamps[u.exposures], np.int64),
        label=_column(requests, lambda u: u.source.labels[u.exposures], np.float32),
        users=torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])])[row],
        has_user=has_user,
    )


def _request_batches(requests: Iterator[VectorRequest], budget: int) -> Iterator[list[VectorRequest]]:
    """Yield batches of requests with a total cost of at most `budget` events (or one request that costs more)."""
    batch: list[VectorRequest] = []
    spent = 0
    for request in requests:
        if batch and spent + request.cost > budget:
            yield batch
            batch, spent = [], 0
        batch.append(request)
        spent += request.cost
    if batch:
        yield batch


def _column(requests: list[VectorRequest], of_request: Callable[[VectorRequest], NDArray], dtype: type) -> NDArray:
    return np.concatenate([np.empty(0, dtype), *(of_request(unit).astype(dtype) for unit in requests)])
