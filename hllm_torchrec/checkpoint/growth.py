"""Loading of embedding tables into larger ones: known rows are copied, the rows of new ids keep their initialization.

It covers weights, averages and optimizer state of replicated and sharded tables, at any sharding plan and world size.
Row-wise optimizer state has one value for each row and column shard: with a column shards of R rows it is a vector of
a x R values, one column shard after the other.

Legend: R rows, D columns, a saved column shards, b column shards of the present plan.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharding_spec import ShardMetadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hllm_torchrec.embedding.tables import local_shards

MODEL = "model"
"""Group of the weights in a checkpoint."""
TABLE_KEY = re.compile(r"\w+\.(?P<parameter>(.+\.)?embedding_bags\.(?P<table>[^.]+)\.weight)(\..+)?")


@dataclass(frozen=True)
class TableRows:
    """Number of rows of a table in a checkpoint and in the model, the unknown id's row 0 included."""

    table: str
    saved: int
    present: int

    @property
    def has_grown(self) -> bool:
        """True if the model's table is larger."""
        return self.saved < self.present

    def __str__(self) -> str:
        known = self.saved - 1
        return f"{self.table}: {known} of {known} ids kept, {self.present - self.saved} new"


def saved_table_rows(saved: Mapping[str, TensorStorageMetadata]) -> dict[str, int]:
    """Table -> number of its rows in a checkpoint, of whose tensors `saved` is the description."""
    found = {}
    for key, tensor in saved.items():
        match = TABLE_KEY.fullmatch(key)
        if match and key == f"{MODEL}.{match['parameter']}":
            found[match["table"]] = int(tensor.size[0])
    return found


def table_rows(
    key: str, tensors: Mapping[str, torch.Tensor], saved: Mapping[str, TensorStorageMetadata]
) -> TableRows | None:
    """Rows of the table to which the weights or optimizer state `key` belong; None if it is of no table.

    tensors: the state by its dotted keys; saved: the checkpoint's tensors.
    """
    match = TABLE_KEY.fullmatch(key)
    weight = f"{MODEL}.{match['parameter']}" if match else ""
    if match is None or weight not in saved:
        return None
    rows = int(saved[weight].size[0])
    # Averages are loaded without the model's group: they have the shape of the weights.
    own = tensors.get(weight, tensors[key])
    return TableRows(match["table"], rows, global_size(own)[0] if weight in tensors or own.dim() == 2 else rows)


def fits(tensor: torch.Tensor, saved: torch.Size, rows: TableRows | None) -> bool:
    """True if a saved tensor of this size can be loaded: it is equal, or the same of a smaller or replanned table."""
    size = global_size(tensor)
    if rows is None or rows.saved > rows.present:
        return size == saved
    if len(size) == len(saved) == 2:
        return size[0] - saved[0] == rows.present - rows.saved and size[1] == saved[1]
    if not _is_rowwise(tensor, saved):
        return size == saved
    a, b = saved[0] / rows.saved, size[0] / rows.present
    return a.is_integer() and b.is_integer() and (a % b == 0 or b % a == 0)


def is_spread(tensor: torch.Tensor, saved: torch.Size, rows: TableRows | None) -> bool:
    """True for row-wise state whose values have other places in the vector here: `spread_rowwise` copies them."""
    if rows is None or not _is_rowwise(tensor, saved):
        return False
    # With one column shard the known rows are the first ones, and are read without a copy of the whole vector.
    shards = saved[0] // rows.saved
    return shards != _columns(tensor, rows) or (shards > 1 and rows.has_grown)


def _is_rowwise(tensor: torch.Tensor, saved: torch.Size) -> bool:
    return isinstance(tensor, ShardedTensor) and len(global_size(tensor)) == len(saved) == 1


def _columns(tensor: torch.Tensor, rows: TableRows) -> int:
    return global_size(tensor)[0] // rows.present


def global_size(tensor: torch.Tensor) -> torch.Size:
    """Return the global size (`ShardedTensor.size()` warns at each call)."""
    return torch.Size(tensor.metadata().size) if isinstance(tensor, ShardedTensor) else tensor.size()


@torch.no_grad()
def first_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor | None:
    """A view of the first rows of a table or of its state; None if this rank has none of them."""
    if not isinstance(tensor, ShardedTensor):
        return tensor[:rows]
    whole = tensor.metadata()
    cut = {tuple(shard.shard_offsets): _cut(shard, rows) for shard in whole.shards_metadata}
    local = []
    for shard in tensor.local_shards():
        metadata = cut[tuple(shard.metadata.shard_offsets)]
        if metadata is not None:
            local.append(Shard(shard.tensor[: metadata.shard_sizes[0]], metadata))
    if not local:
        return None
    of_rows = ShardedTensorMetadata(
        shards_metadata=[shard for shard in cut.values() if shard is not None],
        size=torch.Size((rows, *whole.size[1:])),
        tensor_properties=whole.tensor_properties,
    )
    view: torch.Tensor = ShardedTensor._init_from_local_shards_and_global_metadata(local, of_rows)
    return view


def _cut(shard: ShardMetadata, rows: int) -> ShardMetadata | None:
    """A shard without the rows from `rows` on; None if nothing is left."""
    kept = min(shard.shard_sizes[0], rows - shard.shard_offsets[0])
    if kept <= 0:
        return None
    return ShardMetadata(list(shard.shard_offsets), [kept, *shard.shard_sizes[1:]], shard.placement)


@torch.no_grad()
def spread_rowwise(values: torch.Tensor, target: torch.Tensor, rows: TableRows) -> None:
    """Copy row-wise state of a column shards into the shards of b.

    They get the mean of the a vectors if there were more, which is exact for equal shards, and copies if there were
    fewer.

    values: the saved vector [a x saved rows].
    """
    b = _columns(target, rows)
    by_shard = values.view(-1, rows.saved)
    if len(by_shard) > b:
        by_shard = by_shard.view(-1, b, rows.saved).mean(0)
    by_shard = by_shard.repeat(b // len(by_shard), 1)
    for part, start, _ in local_shards(target):
        column, row = divmod(start, rows.present)
        kept = max(0, min(len(part), rows.saved - row))
        part[:kept].copy_(by_shard[column, row : row + kept])


def starts_anew(key: str, rows: Mapping[str, TableRows]) -> bool:
    """True for optimizer state or averages of a grown table, which may lie in another group than in the checkpoint.

    A replicated table that grows to `features.shard_from_rows` rows becomes a sharded one: its state then belongs to
    another optimizer, and starts anew.

    rows: table -> its rows.
    """
    match = TABLE_KEY.fullmatch(key)
    table = rows.get(match["table"]) if match else None
    return match is not None and table is not None and table.has_grown and key != f"{MODEL}.{match['parameter']}"
