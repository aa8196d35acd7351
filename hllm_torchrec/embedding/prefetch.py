"""Exchanges the ids of the next batch between the ranks' tables while the present batch is being computed.

    begin(next)   before the forward pass: starts the exchange of the numbers of ids
    send()        before the backward pass: starts the exchange of the ids themselves
    forward       of the next batch: the ids have arrived; rows are looked up and returned as usual

Ids do not depend on weights, so results are the same as without prefetching. TorchRec's own pipelines do the same, but
trace the model to find its tables; here they are given.
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
    """Yield each step with the one after it (None after the last); unless `enabled`, always with None."""
    if not enabled:
        yield from ((step, None) for step in steps)
        return
    for step, following in pairwise(chain(steps, [None])):
        assert step is not None
        yield step, following


@dataclass
class _PendingLookup:
    """A batch whose ids are in flight. values: its ids, which identify it; ids_sent: False while only sizes are."""

    values: Tensor
    context: Any
    awaitable: Any
    ids_sent: bool = False


class TablePrefetcher:
    """Replaces the forward pass of sharded tables by one that uses prefetched ids, if there are any for its batch.

    Other batches (for example of an evaluation in between) are looked up as usual. All calls are collective.
    """

    def __init__(self, tables: ShardedModule[Any, Any, Any, Any]) -> None:
        self.tables = tables
        self._pending: list[_PendingLookup] = []
        tables.forward = self._forward

    def begin(self, features: KeyedJaggedTensor) -> None:
        """Start the exchange for the bags of the next training batch; on CUDA they must be on the device already."""
        features, context = pad_empty_batch(features), self.tables.create_context()
        self._pending.append(_PendingLookup(features.values(), context, self.tables.input_dist(context, features)))

    def send(self) -> None:
        """Wait for the sizes, and start sending the ids."""
        for batch in self._pending:
            if not batch.ids_sent:
                batch.awaitable, batch.ids_sent = batch.awaitable.wait(), True

    def finish(self) -> None:
        """Wait for pending exchanges and discard them: none may be in flight when a segment of training ends."""
        self.send()
        for batch in self._pending:
            batch.awaitable.wait()
        self._pending.clear()

    def _forward(self, features: KeyedJaggedTensor) -> Any:
        # By identity of the ids tensor: batches are the same objects when they come to the forward pass, and an equal
        # batch of an evaluation must not take over the exchange.
        found = next((batch for batch in self._pending if batch.values is features.values()), None)
        # input_dist returns an awaitable of an awaitable: the first wait is for the sizes, the second for the ids.
        if found is None:
            context = self.tables.create_context()
            return self.tables.compute_and_output_dist(context, self.tables.input_dist(context, features).wait().wait())
        self._pending = [batch for batch in self._pending if batch is not found]
        if not found.ids_sent:
            found.awaitable = found.awaitable.wait()
        return self.tables.compute_and_output_dist(found.context, found.awaitable.wait())
