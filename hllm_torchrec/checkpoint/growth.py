"""Loading of saved embedding tables into larger ones: known rows are copied, rows of new ids keep their initialization.

It supports weights, averages and optimizer state of replicated and sharded tables, at any sharding plan and world size.
Row-wise optimizer state has one value for each row and column shard: for A column shards of R rows it is a vector of
A x R values, one column shard after the other, in the order of their columns.

Legend: R rows, A column shards in the checkpoint, B column shards in the model.
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
"""First component of the keys of the weights in a checkpoint."""
TABLE_KEY = re.compile(r"\w+\.(?P<parameter>(.+\.)?embedding_bags\.(?P<table>[^.]+)\.weight)(\..+)?")


@dataclass(frozen=True)
class TableRows:
    """Number of rows of a table in a checkpoint (`saved`) and in the model (`present`), including the unknown id 0."""

    table: str
    saved: int
    present: int

    @property
    def has_grown(self) -> bool:
        """True if the table of the model has more rows than that of the checkpoint."""
        return self.saved < self.present

    def __str__(self) -> str:
        known = self.saved - 1
        return f"{self.table}: {known} of {known} ids kept, {self.present - self.saved} new"


def saved_table_rows(saved: Mapping[str, TensorStorageMetadata]) -> dict[str, int]:
    """Return table -> number of its rows in a checkpoint; saved: key -> metadata of the checkpoint's tensors."""
    found = {}
    for key, tensor in saved.items():
        match = TABLE_KEY.fullmatch(key)
        if match and key == f"{MODEL}.{match['parameter']}":
            found[match["table"]] = int(tensor.size[0])
    return found


def table_rows(
    key: str, tensors: Mapping[str, torch.Tensor], saved: Mapping[str, TensorStorageMetadata]
) -> TableRows | None:
    """Return the rows of the table to which the tensor `key` belongs; None for a tensor that belongs to no table.

    tensors: the model's state by dotted keys; saved: key -> metadata of the checkpoint's tensors.
    """
    match = TABLE_KEY.fullmatch(key)
    weight = f"{MODEL}.{match['parameter']}" if match else ""
    if match is None or weight not in saved:
        return None
    rows = int(saved[weight].size[0])
    # `tensors` may have the averages without the weights: an average has the shape of the weights.
    reference = tensors.get(weight, tensors[key])
    is_table = weight in tensors or reference.dim() == 2
    return TableRows(match["table"], rows, global_size(reference)[0] if is_table else rows)


def fits(tensor: torch.Tensor, saved: torch.Size, rows: TableRows | None) -> bool:
    """Return True if a saved tensor of size `saved` can be loaded into `tensor`.

    The sizes must be equal, or those of a table (or its state) with fewer saved rows or with another sharding plan.
    """
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
    """Return True for row-wise state whose values have other positions in the model's vector than in the saved one.

    Such state must be copied by `spread_rowwise`.
    """
    if rows is None or not _is_rowwise(tensor, saved):
        return False
    # With one column shard in both, the known rows are the first ones and can be read directly.
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
    """Return a view of the first rows of a table or of its state; None if this rank has none of these rows."""
    if not isinstance(tensor, ShardedTensor):
        return tensor[:rows]
    full = tensor.metadata()
    cut = {tuple(shard.shard_offsets): _cut(shard, rows) for shard in full.shards_metadata}
    local = []
    for shard in tensor.local_shards():
        metadata = cut[tuple(shard.metadata.shard_offsets)]
        if metadata is not None:
            local.append(Shard(shard.tensor[: metadata.shard_sizes[0]], metadata))
    if not local:
        return None
    of_rows = ShardedTensorMetadata(
        shards_metadata=[shard for shard in cut.values() if shard is not None],
        size=torch.Size((rows, *full.size[1:])),
        tensor_properties=full.tensor_properties,
    )
    view: torch.Tensor = ShardedTensor._init_from_local_shards_and_global_metadata(local, of_rows)
    return view


def _cut(shard: ShardMetadata, rows: int) -> ShardMetadata | None:
    """Return the metadata of a shard without rows `rows` and above of the table; None if no row is left."""
    kept = min(shard.shard_sizes[0], rows - shard.shard_offsets[0])
    if kept <= 0:
        return None
    return ShardMetadata(list(shard.shard_offsets), [kept, *shard.shard_sizes[1:]], shard.placement)


@torch.no_grad()
def spread_rowwise(values: torch.Tensor, target: torch.Tensor, rows: TableRows) -> None:
    """Copy row-wise state of A saved column shards into B column shards; one of A and B divides the other.

    If A > B, a shard gets the mean of the A / B saved shards that have its columns, which is exact if these are equally
    wide. If A < B, all B / A shards with the columns of a saved shard get copies of its state.

    values: the saved vector [A x saved rows]; target: the model's vector [B x present rows].
    """
    b = _columns(target, rows)
    by_shard = values.view(-1, rows.saved)
    # Column shards are in the order of their columns: A / B successive saved shards become one, or one becomes B / A.
    if len(by_shard) > b:
        by_shard = by_shard.view(b, -1, rows.saved).mean(1)
    by_shard = by_shard.repeat_interleave(b // len(by_shard), 0)
    for part, start, _ in local_shards(target):
        column, row = divmod(start, rows.present)
        kept = max(0, min(len(part), rows.saved - row))
        part[:kept].copy_(by_shard[column, row : row + kept])


def starts_anew(key: str, rows: Mapping[str, TableRows]) -> bool:
    """Return True for optimizer state and averages of a grown table, which may start from their initial values.

    A replicated table that grows to `features.shard_from_rows` rows becomes a sharded table. Another optimizer then
    updates it, so the keys of its state differ from those in the checkpoint, and the saved state is not loaded.

    rows: table -> its rows.
    """
    match = TABLE_KEY.fullmatch(key)
    table = rows.get(match["table"]) if match else None
    return match is not None and table is not None and table.has_grown and key != f"{MODEL}.{match['parameter']}"
