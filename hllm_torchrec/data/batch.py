"""`HybridBatch`: the input of one step on one rank, jagged from file to loss.

A batch holds pieces of users. A piece is a contiguous range of one user's events: its *history* (the input of the
user encoder) and its *exposures* (labelled events to predict). An exposure sees only history of strictly earlier
seconds (ranking; with a feedback delay, more than this delay earlier) or of earlier positions (leave-one-out
retrieval); `query_visible` is the number of these positions.

If actions are interleaved, an event takes two positions of the history, an item token and an action token. Both
have the event's item id and second; "history positions" below are tokens.

Legend: B pieces, T history positions, Q queries, X exposures, G generative targets, K negatives, U unique
items, S slots of the ID features (T history, then Q queries, then X targets for late fusion, then U items if
the generative loss compares items by their features), H history positions before Stochastic Length, N requests, J
tasks, P contexts of the position bias, F columns of the numeric or of the evidence features, V of the dense item
features.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from hllm_torchrec.data.creative_batch import CreativeBatch


@dataclass
class HybridBatch(Pipelineable):
    """One step's input. Ids and offsets are int64; offsets start at 0 and have one entry more than rows."""

    user_ids: Tensor
    """[B] the user of every piece."""
    seq_offsets: Tensor
    """[B+1] boundaries of the pieces in T."""
    item_ids: Tensor
    """[T] history items."""
    timestamps: Tensor
    """[T] seconds UTC."""
    next_times: Tensor
    """[T] seconds UTC of the piece's next event that can be history; the event's own second if there is none, and at
    an item token if actions are interleaved.
    """
    query_offsets: Tensor
    """[B+1] boundaries of the pieces in Q."""
    query_times: Tensor
    """[Q] seconds UTC of the requests."""
    query_visible: Tensor
    """[Q] number of history positions that a query sees, from the start of the query's piece."""
    query_target: Tensor
    """[Q] early fusion: index in X of the exposure that is the query; late fusion: empty."""
    target_query: Tensor
    """[X] index in Q of the query whose output predicts the exposure."""
    target_items: Tensor
    """[X] exposed items."""
    labels: Tensor
    """[X] float32, 0 or 1."""
    weights: Tensor
    """[X] float32, the exposure's weight in the loss, and in metrics."""
    positions: Tensor
    """[X] the exposure's index in the user's complete sequence: (user, position) identifies it."""
    history_lengths: Tensor
    """[X] number of the user's events more than `feedback_delay` seconds earlier, in the complete sequence."""
    next_rows: Tensor
    """[G] rows of T that predict a next item."""
    next_items: Tensor
    """[G] the next items to predict."""
    negative_items: Tensor
    """[K] items sampled from the catalogue, the same on every rank."""
    unique_items: Tensor
    """[U] sorted unique item ids of this batch."""
    history_index: Tensor
    """[T] index into unique_items."""
    target_index: Tensor
    """[X] index into unique_items."""
    next_index: Tensor
    """[G] index into unique_items."""
    negative_index: Tensor
    """[K] index into unique_items."""
    features: KeyedJaggedTensor
    """S bags per ID, time and categorical feature."""
    numeric: Tensor | None
    """[S, F] float32, or None: numeric features (0 outside of queries), then numeric context (NaN outside of queries
    and where unknown).
    """
    evidence: Tensor | None
    """[X, F] float32 evidence features of each exposure (`data.evidence`), or None."""
    item_vectors: Tensor | None
    """[U, V] float32 dense features of unique_items, or None."""
    target_values: Tensor
    """[X] float32 in [-1, 1]: the exposure's ordinal action (rating), or its label; NaN where unknown."""
    task_labels: Tensor | None = None
    """[X, J] float32 labels of `BatchSpec.tasks`, NaN where not defined; None: the only task is the first label."""
    task_weights: Tensor | None = None
    """[X, J] float32 weight of an exposure in the loss of each task, 0 where its label is not defined; or None."""
    bias_ids: Tensor | None = None
    """[X, P] ids of the context of `BatchSpec.bias`, or None."""
    logit_offset: Tensor | None = None
    """[X] float32, added to the first label's logit in training only: -log of the sampling rate of the negatives at
    this row, or of the expected number of drawn ones; None: no negatives were left out or drawn, or not in training.
    """
    full_history_items: Tensor | None = None
    """[H] history items before Stochastic Length removes any; None without Stochastic Length (then equal to
    `item_ids`).
    """
    full_history_offsets: Tensor | None = None
    """[B+1] boundaries of the pieces in H, or None."""
    request_query: Tensor | None = None
    """[N] index in Q of the query of each additional request (`Piece.requests`); None without requests."""
    request_index: Tensor | None = None
    """[N] index into unique_items of the item of each request, or None."""
    creative: CreativeBatch | None = None
    """Texts of the requests, or None."""

    def to(self, device: torch.device, non_blocking: bool = False) -> "HybridBatch":
        """A copy on `device`."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "HybridBatch":
        """A copy in page-locked memory."""
        return self._map(lambda x: x.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses these tensors (`Tensor.record_stream`)."""
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if value is not None:
                value.record_stream(stream)

    def _map(self, function: Callable[[Any], Any]) -> "HybridBatch":
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        mapped: dict[str, Any] = {name: None if x is None else function(x) for name, x in values.items()}
        return HybridBatch(**mapped)

    @property
    def full_history(self) -> tuple[Tensor, Tensor]:
        """(items [H], offsets [B+1]) of the complete history, including events that Stochastic Length removed."""
        if self.full_history_items is None or self.full_history_offsets is None:
            return self.item_ids, self.seq_offsets
        return self.full_history_items, self.full_history_offsets

    @property
    def num_exposures(self) -> int:
        """Number of exposures X."""
        return self.labels.numel()
