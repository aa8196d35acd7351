"""The exchange of a batch's ids among the ranks' tables, while the batch before is still being computed.

    begin(next)   in front of the forward pass: how many ids go where
    send()        in front of the backward pass: the ids themselves
    forward       of the next batch: they are there; rows are looked up and come back as ever

Ids depend on no weight, so every number stays what it is without. TorchRec's own pipelines do the same, but trace the
model to find its tables; this one knows them.
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
    """Each step with the one after it; without looking ahead, steps are fetched one by one and come with None."""
    if not enabled:
        yield from ((step, None) for step in steps)
        return
    for step, following in pairwise(chain(steps, [None])):
        assert step is not None
        yield step, following


@dataclass
class _PendingLookup:
    """A batch whose ids are on their way. values: its ids, by which it is known again; ids_sent: sizes are known."""

    values: Tensor
    context: Any
    awaitable: Any
    ids_sent: bool = False


class TablePrefetcher:
    """Takes over the forward pass of sharded tables, which then finds what was begun for it.

    Other batches (an evaluation's, in between) are looked up as ever. All calls are collective.
    """

    def __init__(self, tables: ShardedModule[Any, Any, Any, Any]) -> None:
        self.tables = tables
        self._pending: list[_PendingLookup] = []
        tables.forward = self._forward

    def begin(self, features: KeyedJaggedTensor) -> None:
        """Start with the bags of the next training batch; on CUDA they are there already."""
        features, context = pad_empty_batch(features), self.tables.create_context()
        self._pending.append(_PendingLookup(features.values(), context, self.tables.input_dist(context, features)))

    def send(self) -> None:
        """Once the sizes are known everywhere: start sending the ids."""
        for batch in self._pending:
            if not batch.ids_sent:
                batch.awaitable, batch.ids_sent = batch.awaitable.wait(), True

    def finish(self) -> None:
        """Wait for what was begun and drop it: nothing may be on its way when a segment of training ends."""
        self.send()
        for batch in self._pending:
            batch.awaitable.wait()
        self._pending.clear()

    def _forward(self, features: KeyedJaggedTensor) -> Any:
        found = next((batch for batch in self._pending if batch.values is features.values()), None)
        if found is None:
            context = self.tables.create_context()
            return self.tables.compute_and_output_dist(context, self.tables.input_dist(context, features).wait().wait())
        self._pending = [batch for batch in self._pending if batch is not found]
        if not found.ids_sent:
            found.awaitable = found.awaitable.wait()
        return self.tables.compute_and_output_dist(found.context, found.awaitable.wait())
