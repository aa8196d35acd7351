"""`PieceView`: the arrays that a piece of a user contributes to a batch, and the join of the views of a batch.

Legend: T history positions, Q queries, X exposures, N requests, U unique items, F numeric or evidence columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from hllm_torchrec.common.arrays import Floats, Ints
from hllm_torchrec.data.events import Events


@dataclass(frozen=True)
class PieceView:
    """Arrays of one piece after the history filter, or of all pieces of a batch after `join_views`.

    history [T]: the events that are read; queries [Q]: the events that give each query its second and context;
    targets [X]: the exposures; numeric [Q, F]; evidence [X, F]. rates [X]: sampling rate of the negatives at each
    exposure, or expected number of drawn ones; requests [N]: see `Piece`. The other names are those of `HybridBatch`;
    `target_query`, `request_query` and `next_rows` are relative to the piece's first query and row until the pieces are
    joined.
    """

    history: Events
    next_times: Ints
    queries: Events
    query_visible: Ints
    target_query: Ints
    targets: Events
    target_values: Floats
    positions: Ints
    history_lengths: Ints
    next_rows: Ints
    next_items: Ints
    numeric: Floats
    evidence: Floats
    rates: Floats
    full_history_items: Ints
    requests: Events
    request_query: Ints


def interleaved_view(view: PieceView) -> PieceView:
    """Return the view with two tokens per history event: its item, then its action, both at the event's second.

    A query sees both tokens of each event that it sees; the next item is predicted at the action token.
    """
    return replace(
        view,
        history=view.history[np.repeat(np.arange(len(view.history)), 2)],
        # The token after an item token is its own action, at the same second.
        next_times=np.stack([view.history.timestamps, view.next_times], axis=1).reshape(-1),
        query_visible=2 * view.query_visible,
        next_rows=2 * view.next_rows + 1,
        full_history_items=np.repeat(view.full_history_items, 2),
    )


def join_views(views: Sequence[PieceView], seq_offsets: Ints, query_offsets: Ints) -> PieceView:
    """Concatenate the views; row and query indices become indices into the batch."""
    counted_from = {"target_query": query_offsets, "request_query": query_offsets, "next_rows": seq_offsets}
    joined: dict[str, Any] = {}
    for name in (field.name for field in fields(PieceView)):
        parts = [getattr(view, name) for view in views]
        if name in counted_from:
            # Not strict: offsets have one entry more than pieces (without pieces: one entry for the empty view).
            parts = [part + first for part, first in zip(parts, counted_from[name], strict=False)]
        joined[name] = Events.concat(parts) if isinstance(parts[0], Events) else np.concatenate(parts)
    return PieceView(**joined)


def unique_items(view: PieceView, negatives: Ints) -> dict[str, Ints]:
    """Return the sorted unique items of the batch [U], and for each kind the indices of its items."""
    kinds = {
        "history_index": view.history.item_ids,
        "target_index": view.targets.item_ids,
        "next_index": view.next_items,
        "negative_index": negatives,
        "request_index": view.requests.item_ids,
    }
    unique, index = np.unique(np.concatenate(list(kinds.values())), return_inverse=True)
    ends = np.cumsum([items.size for items in kinds.values()])
    return {"unique_items": unique, **dict(zip(kinds, np.split(index, ends[:-1]), strict=True))}
