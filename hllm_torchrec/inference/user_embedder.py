"""User embeddings from histories: one for each request, made from the events before it and nothing else.

Legend: n pieces, X exposures in them, D width of a user vector.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.events import Events, Piece
from hllm_torchrec.models.assembly import Experiment
from hllm_torchrec.models.parallelize import autocast

DAY = 86_400
"""Seconds of a day, UTC."""


class UserEmbedder:
    """Embeds the user as each exposure of some pieces finds them: made from events of strictly earlier seconds.

    Late fusion: the [USER] query's output at the exposure's second. Otherwise the last visible event's hidden state,
    in item space where the generative loss compares there. Make one with `open_embedder`.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.width = experiment.hllm.user_vector_width
        spec = replace(experiment.batch_spec, visibility="second", negatives=0, item_slots=False)
        self._collator = Collator(experiment.dataset, spec, item_vectors=experiment.item_vectors)

    @torch.no_grad()
    def __call__(self, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
        """Vectors [X, D] float32, zeros where there is none, and whether there is one, bool [X]. Collective.

        pieces: [n], may be empty. A user without an event before an exposure has no vector there.
        """
        batch = self._collator(pieces, 0, 0).to(self.experiment.device)
        with autocast(self.experiment.config, self.experiment.device):
            vectors = self.experiment.hllm.embed_users(batch)[batch.target_query].float()
        known = batch.query_visible[batch.target_query] > 0
        return vectors * known[:, None], known


@contextmanager
def open_embedder(experiment: Experiment) -> Iterator[UserEmbedder]:
    """An embedder of the experiment's present weights, item embeddings made ready. Collective."""
    hllm = experiment.hllm
    was_training = hllm.training
    hllm.eval()
    try:
        with experiment.evaluation_items():
            yield UserEmbedder(experiment)
    finally:
        hllm.train(was_training)


def history_request(piece: Piece, num_events: int, second: int, max_history: int) -> Piece:
    """A piece of the last of the first `num_events` events and one exposure, of no item, at `second`, which is after
    them.

    max_history: events of the piece at most, the exposure included, as in training.
    """
    start = max(0, num_events - max_history + 1)
    read = piece.cut(start, num_events, num_events)
    exposure = Events.at([second], labels=[0])
    return replace(read, **Events.concat([read, exposure]).columns)


def next_midnight(second: int) -> int:
    """The first second of the day after that of `second` (UTC): when a nightly job would run."""
    return (second // DAY + 1) * DAY


def nightly_request(piece: Piece, num_events: int, max_history: int) -> Piece:
    """The request of the nightly job after the last of the first `num_events` >= 1 events: a function of these
    alone."""
    return history_request(piece, num_events, next_midnight(int(piece.timestamps[num_events - 1])), max_history)
