"""Interface of the user encoders: from packed histories and queries to one hidden state per row.

    forward(x_TD, seq_offsets, timestamps, queries, next_times) -> (h_TD, q_QD)

A history position sees its sequence up to itself. A query sees the first `visible` positions and itself. No other row
sees a query.

Legend: B users, T history positions, Q queries, S = T + Q packed rows, N events of one user, n new ones, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.modules.attention.keys_values import HistoryCache, KeysValues, ScoreCandidates, ScoreRequests
from hllm_torchrec.modules.jagged import lengths_from_offsets, position_in_sequence, sequence_of_position

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Queries:
    """Query tokens of a packed batch.

    x_QD: [Q, D] inputs; offsets: [B+1] int64, offsets of each user's queries; visible: [Q] int64, each query sees this
    number of positions from the start of its user's history; times: [Q] int64 seconds of the requests.
    """

    x_QD: Tensor
    offsets: Tensor
    visible: Tensor
    times: Tensor


@dataclass(frozen=True)
class PackedRows:
    """S packed rows: T history positions, then Q queries.

    seq_offsets, query_offsets: [B+1] int64, offsets of each user's history positions and queries. visible: [Q] int64,
    see `Queries`. positions, sequences: [S] int64, each row's position in its sequence (a query's position follows the
    positions that it sees) and the index of the sequence. times: [S] int64 seconds of the events and requests.
    asked_at: [S] int64 seconds from which a row measures time differences: the time of the request for a query, the
    time of the event or of the next event for a history position.
    """

    seq_offsets: Tensor
    query_offsets: Tensor
    visible: Tensor
    positions: Tensor
    sequences: Tensor
    times: Tensor
    asked_at: Tensor

    @property
    def history(self) -> int:
        """T."""
        return self.positions.numel() - self.visible.numel()


def pack_rows(
    seq_offsets: Tensor,
    total: int,
    timestamps: Tensor | None = None,
    queries: Queries | None = None,
    next_times: Tensor | None = None,
) -> PackedRows:
    """Build the rows of T = `total` history positions and of the queries.

    timestamps: [T] int64 seconds, None: zeros; next_times: [T] int64 seconds of the event after each position (after
    the last position: of the request), None: the position's own time.
    """
    # History rows come first in every field, then the queries: `forward` splits the output at T.
    nothing = seq_offsets.new_zeros(0)
    times = seq_offsets.new_zeros(total) if timestamps is None else timestamps
    asked_at = times if next_times is None else next_times
    positions, sequences = position_in_sequence(seq_offsets, total), sequence_of_position(seq_offsets, total)
    if queries is None:
        return PackedRows(seq_offsets, torch.zeros_like(seq_offsets), nothing, positions, sequences, times, asked_at)
    number = queries.visible.numel()
    return PackedRows(
        seq_offsets,
        queries.offsets,
        queries.visible,
        torch.cat([positions, queries.visible]),
        torch.cat([sequences, sequence_of_position(queries.offsets, number)]),
        torch.cat([times, queries.times.to(times.dtype)]),
        torch.cat([asked_at, queries.times.to(times.dtype)]),
    )


class UserEncoder(nn.Module, ABC):
    """Base class of the User LLM, HSTU, SASRec and LiGR: subclasses have `layers` (the User LLM a `backbone`) and
    implement `encode` and `flops`.

    A configuration selects a custom encoder by `module:Name`. It is built as `Name(shape, dropout)`, where `shape` is
    an instance of the class's `Shape` with the configured fields.

    Args:
        width: D.
        dropout: dropout of the inputs, a probability.
        positions: number of rows of a table of learned position vectors that are added to the inputs; 0: no table.
        query_next_time: a history position measures time differences from the next event (`PackedRows.asked_at`).
        count_from_end: positions are counted from a sequence's last event; queries are then not supported.
    """

    layers: nn.ModuleList
    reads_text: ClassVar[bool] = False
    """False: inputs are features, to which gradients are propagated (`ItemLLM.reads_text` is True)."""
    keeps_history: ClassVar[bool] = False
    """True if a history can be cached for scoring candidates later (`read_history`, `begin_request`)."""
    Shape: ClassVar[type]
    """Dataclass of the shape of a custom encoder, with the fields width, layers and any others."""

    def __init__(
        self,
        width: int,
        dropout: float = 0.0,
        positions: int = 0,
        query_next_time: bool = False,
        count_from_end: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.dropout = nn.Dropout(dropout)
        self.positions = nn.Embedding(positions, width) if positions else None
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.02)
        self.query_next_time, self.count_from_end = query_next_time, count_from_end
        self.backbone: PreTrainedModel | None = None
        """The Hugging Face model of the encoder, or None."""
        self.context_prefix = 0
        """Number of positions at the start of a history that see one another, and so must be read in one call."""
        self.context_sees_history = False
        """True if these positions see the complete history: then every later position sees the future through them."""
        self.recompute = False
        """Activation checkpointing: if True, each layer runs again in the backward pass."""

    def forward(
        self,
        x_TD: Tensor,
        seq_offsets: Tensor,
        timestamps: Tensor | None = None,
        queries: Queries | None = None,
        next_times: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x_TD [T, D] packed history -> h_TD [T, D] (h_i sees positions up to i) and q_QD [Q, D].

        seq_offsets: [B+1] int64; timestamps, next_times: see `pack_rows`.

        Raises:
            ValueError: the encoder uses the next event's time and `next_times` is None; the encoder counts positions
                from the end and there are queries; or a row's position is beyond the table of positions.
        """
        if self.query_next_time and next_times is None:
            raise ValueError(
                "the encoder measures time from the next event (time_of 'next'), but next_times is None: pass the "
                "times, or build the encoder with time_of 'event'"
            )
        total = x_TD.shape[0]
        rows = pack_rows(seq_offsets, total, timestamps, queries, next_times if self.query_next_time else None)
        inputs = x_TD if queries is None else torch.cat([x_TD, queries.x_QD])
        # A rank without users still takes part in the collectives: see `_dummy_forward`.
        if inputs.shape[0] == 0:
            return self._dummy_forward(inputs), inputs
        hidden = self.encode(self._prepare(inputs, rows), rows)
        return hidden[:total], hidden[total:]

    @abstractmethod
    def encode(self, x_SD: Tensor, rows: PackedRows) -> Tensor:
        """All layers: [S, D] -> [S, D]."""

    @abstractmethod
    def flops(self, tokens: int, keys: int) -> float:
        """FLOPs of a forward pass over `tokens` rows that see `keys` keys in total, 2 per multiply-add."""

    def blocks(self) -> nn.ModuleList:
        """The layers, first to last: the units of compilation, sharding (FSDP2) and recomputation."""
        return self.layers

    def recompute_activations(self) -> None:
        """Enable activation checkpointing: each layer runs again in the backward pass."""
        self.recompute = True

    def attention_backend(self, device: torch.device) -> str | None:
        """The attention backend on a device, with the reason, for the log; None if there is only one.

        Raises:
            ValueError: the configured backend cannot run on the device.
        """
        return None

    def read_history(self, x_ND: Tensor, times: Tensor, cache: HistoryCache | None) -> list[KeysValues]:
        """Keys and values of every layer, including the cached ones: see `history_cache.read_history`.

        x_ND: [n, D] features of the n >= 1 events after the cached ones; times: [N] int64 seconds of all events.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot cache the keys and values of a history")

    def begin_request(self, cache: HistoryCache, time: int, visible: int) -> ScoreCandidates:
        """Outputs of candidates that see the first `visible` events: see `history_cache.begin_request`."""
        raise NotImplementedError(f"{type(self).__name__} cannot cache the keys and values of a history")

    def begin_requests(
        self, caches: Sequence[HistoryCache], times: Sequence[int], visible: Sequence[int]
    ) -> ScoreRequests:
        """Outputs of the candidates of several requests: see `history_cache.begin_requests`."""
        asks = [self.begin_request(*one) for one in zip(caches, times, visible, strict=True)]

        def ask(x_mD: Tensor, counts: Sequence[int]) -> Tensor:
            return torch.cat([one(part) for one, part in zip(asks, x_mD.split(list(counts)), strict=True)])

        return ask

    def run_layer(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """Run a layer, with activation checkpointing if `recompute` is set."""
        if self.recompute and torch.is_grad_enabled():
            output: Tensor = checkpoint(layer, *inputs, use_reentrant=False)
            return output
        return layer(*inputs)

    def _prepare(self, inputs: Tensor, rows: PackedRows) -> Tensor:
        positions = rows.positions
        if self.count_from_end:
            if rows.visible.numel():
                raise ArgumentError(
                    "count_from: 'end': positions are counted from the end of the history, but query tokens see "
                    "histories of different lengths: write start"
                )
            # The last event of a sequence has position 0.
            positions = lengths_from_offsets(rows.seq_offsets)[rows.sequences] - 1 - positions
        return self.add_positions(inputs, positions)

    def add_positions(self, x_SD: Tensor, positions: Tensor) -> Tensor:
        """Add the vectors of `positions` [S] (if the encoder has a table of them) to x [S, D], and apply dropout.

        Raises:
            ValueError: a position is beyond the table.
        """
        if self.positions is None:
            return self.dropout(x_SD)
        table, longest = self.positions.num_embeddings, int(positions.max())
        if longest >= table:
            raise ArgumentError(
                f"max_positions: {table}: a row stands at position {longest}: raise it, or give shorter histories"
            )
        return self.dropout(x_SD + self.positions(positions))

    def _dummy_forward(self, inputs: Tensor) -> Tensor:
        """Run the layers on one row and drop its output: [0, D], with a graph through every weight and the inputs.

        A rank without users must do so, because FSDP's collectives and the tables' backward pass need every rank. The
        row is the sum of the empty inputs [0, D], which is 0 and part of the graph.
        """
        rows = pack_rows(torch.tensor([0, 1], device=inputs.device), 1)
        return self.encode(self._prepare(inputs.sum(0, keepdim=True), rows), rows)[:0]


def dense_flops(modules: Sequence[nn.Module]) -> float:
    """FLOPs of the linear layers within `modules` for one row."""
    linear = [m for module in modules for m in module.modules() if isinstance(m, nn.Linear)]
    return 2.0 * sum(m.in_features * m.out_features for m in linear)
