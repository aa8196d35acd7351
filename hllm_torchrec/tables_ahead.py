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

from hllm_torchrec.modules.hybrid_features import with_a_slot

T = TypeVar("T")


def with_next(steps: Iterable[T], looks_ahead: bool) -> Iterator[tuple[T, T | None]]:
    """Each step with the one after it; without looking ahead, steps are fetched one by one and come with None."""
    if not looks_ahead:
        yield from ((step, None) for step in steps)
        return
    for step, following in pairwise(chain(steps, [None])):
        assert step is not None
        yield step, following


@dataclass
class _Begun:
    """A batch whose ids are on their way. values: its ids, by which it is known again; sent: sizes are known."""

    values: Tensor
    context: Any
    coming: Any
    sent: bool = False


class TablesAhead:
    """Takes over the forward pass of sharded tables, which then finds what was begun for it.

    Other batches (an evaluation's, in between) are looked up as ever. All calls are collective.
    """

    def __init__(self, tables: ShardedModule[Any, Any, Any, Any]) -> None:
        self.tables = tables
        self._begun: list[_Begun] = []
        tables.forward = self._forward

    def begin(self, features: KeyedJaggedTensor) -> None:
        """Start with the bags of the next training batch; on CUDA they are there already."""
        features, context = with_a_slot(features), self.tables.create_context()
        self._begun.append(_Begun(features.values(), context, self.tables.input_dist(context, features)))

    def send(self) -> None:
        """Once the sizes are known everywhere: start sending the ids."""
        for batch in self._begun:
            if not batch.sent:
                batch.coming, batch.sent = batch.coming.wait(), True

    def finish(self) -> None:
        """Wait for what was begun and drop it: nothing may be on its way when a leg of training ends."""
        self.send()
        for batch in self._begun:
            batch.coming.wait()
        self._begun.clear()

    def _forward(self, features: KeyedJaggedTensor) -> Any:
        found = next((batch for batch in self._begun if batch.values is features.values()), None)
        if found is None:
            context = self.tables.create_context()
            return self.tables.compute_and_output_dist(context, self.tables.input_dist(context, features).wait().wait())
        self._begun = [batch for batch in self._begun if batch is not found]
        if not found.sent:
            found.coming = found.coming.wait()
        return self.tables.compute_and_output_dist(found.context, found.coming.wait())
