"""Prefetching of table ids: ranks exchange the ids of the next batch while the current batch is computed.

    begin(next)   before the forward pass of the current batch: starts the exchange of the numbers of ids
    send()        before its backward pass: starts the exchange of the ids
    forward       of the next batch: uses the received ids; rows are looked up and returned as usual

Ids do not depend on weights, so results are the same as without prefetching. TorchRec's pipelines do the same, but
trace the model to find its tables; `TablePrefetcher` gets the tables as an argument.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, TypeVar

from torch import Tensor
from torchrec.distributed.types import ShardedModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hllm_torchrec.modules.features.hybrid import pad_empty_batch

T = TypeVar("T")


def with_lookahead(steps: Iterable[T], enabled: bool) -> Iterator[tuple[T, T | None]]:
    """Yield each step with the next step (None for the last one); if not `enabled`, always with None."""
    if not enabled:
        yield from ((step, None) for step in steps)
        return
    for step, following in pairwise(chain(steps, [None])):
        assert step is not None
        yield step, following


@dataclass
class _PendingLookup:
    """Exchange of a batch's ids. values: the ids tensor, which identifies the batch; ids_sent: False until `send`."""

    values: Tensor
    context: Any
    awaitable: Any
    ids_sent: bool = False


class TablePrefetcher:
    """Replaces the forward pass of sharded tables by one that uses the prefetched ids of its batch, if there are any.

    Other batches (for example those of an evaluation in between) are looked up as usual. All calls are collective.
    """

    def __init__(self, tables: ShardedModule[Any, Any, Any, Any]) -> None:
        self.tables = tables
        self._pending: list[_PendingLookup] = []
        tables.forward = self._forward

    def begin(self, features: KeyedJaggedTensor) -> None:
        """Start the exchange for the features of the next training batch, which must be on the tables' device."""
        features, context = pad_empty_batch(features), self.tables.create_context()
        self._pending.append(_PendingLookup(features.values(), context, self.tables.input_dist(context, features)))

    def send(self) -> None:
        """Wait for the numbers of ids, and start the exchange of the ids."""
        for batch in self._pending:
            if not batch.ids_sent:
                batch.awaitable, batch.ids_sent = batch.awaitable.wait(), True

    def finish(self) -> None:
        """Wait for pending exchanges and discard their ids: no exchange may be pending when a training segment ends."""
        self.send()
        for batch in self._pending:
            batch.awaitable.wait()
        self._pending.clear()

    def _forward(self, features: KeyedJaggedTensor) -> Any:
        # Compare by identity: `begin` got the same tensor of ids, while a batch of an evaluation may have equal ids but
        # must not use this exchange.
        found = next((batch for batch in self._pending if batch.values is features.values()), None)
        # input_dist returns an awaitable of an awaitable: the first wait is for the sizes, the second for the ids.
        if found is None:
            context = self.tables.create_context()
            return self.tables.compute_and_output_dist(context, self.tables.input_dist(context, features).wait().wait())
        self._pending = [batch for batch in self._pending if batch is not found]
        if not found.ids_sent:
            found.awaitable = found.awaitable.wait()
        return self.tables.compute_and_output_dist(found.context, found.awaitable.wait())
