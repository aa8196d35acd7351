"""User embeddings from histories: one per request, computed only from events before the request.

Legend: n pieces, X exposures in them, D width of a user vector.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from hllm_torchrec.data.events import Events, Piece
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.parallelize import autocast

DAY = 86_400
"""Seconds per day."""


class UserEmbedder:
    """Computes the user embedding at each exposure of pieces, from the events visible at its second.

    Visible are events of strictly earlier seconds or, with `data.feedback_delay`, events more than that many seconds
    earlier. The result is that of `HLLM.embed_users`. Created by `open_embedder`.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.width = experiment.hllm.user_vector_width
        spec = replace(experiment.batch_spec, visibility="second", negatives=0, item_slots=False)
        self._collator = experiment.request_collator(spec)

    @torch.no_grad()
    def __call__(self, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
        """Return vectors [X, D] float32 (zeros if missing) and a mask of existing vectors, bool [X]. Collective.

        pieces: [n], may be empty. An exposure without a visible event has no vector.
        """
        batch = self._collator(pieces, 0, 0).to(self.experiment.device)
        with autocast(self.experiment.config, self.experiment.device):
            vectors = self.experiment.hllm.embed_users(batch)[batch.target_query].float()
        known = batch.query_visible[batch.target_query] > 0
        return vectors * known[:, None], known


@contextmanager
def open_embedder(experiment: Experiment) -> Iterator[UserEmbedder]:
    """Context manager: yields an embedder with the experiment's current weights and item embeddings. Collective."""
    hllm = experiment.hllm
    was_training = hllm.training
    hllm.eval()
    try:
        with experiment.evaluation_items():
            yield UserEmbedder(experiment)
    finally:
        hllm.train(was_training)


def history_request(piece: Piece, num_events: int, second: int, max_history: int) -> Piece:
    """Build a piece with the last of the first `num_events` events, followed by an exposure without an item.

    second: time of the exposure, after these events; max_history: maximum number of events of the piece, including the
    exposure, as in training.
    """
    start = max(0, num_events - max_history + 1)
    read = piece.cut(start, num_events, num_events)
    exposure = Events.at([second], labels=[0])
    return replace(read, **Events.concat([read, exposure]).columns)


def next_midnight(second: int) -> int:
    """First second of the UTC day after `second`, which is the time of a nightly job."""
    return (second // DAY + 1) * DAY


def nightly_request(piece: Piece, num_events: int, max_history: int, delay: int = 0) -> Piece:
    """Request of the first nightly job that may see the user's first `num_events` (>= 1) events.

    The request depends only on these events. delay: seconds from an event until it may be seen.
    """
    seen_from = int(piece.timestamps[num_events - 1]) + delay
    return history_request(piece, num_events, next_midnight(seen_from), max_history)
