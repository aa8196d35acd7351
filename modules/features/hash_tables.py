"""Embedding tables for an open vocabulary: any number of ids use a fixed number of rows, without collisions between ids
that have been assigned a row.

TorchRec's managed collisions (ZCH) with a set-associative map. An id hashes to one set of WAYS rows. In training, an id
without a row is assigned a free row of its set, or the row of an id that no step has read for `evict_after` steps (the
one unread for the longest time first); the row and its optimizer state are then reset. If the set has no such row, and
in evaluation, the id reads the last row of its set, which all ids of the set without an assigned row share.

    set(id) = hash(id) mod G         row(id) = WAYS * set(id) + way(id)

Every lookup and admission reads only the sets of the batch's ids, so the cost does not depend on the size of the table.
Sets are contiguous rows: a row-wise shard has complete sets, and a checkpoint can be loaded with any number of ranks
that divides the number of sets. The assignment depends on the ids of the steps, not on the number of ranks.

Legend: G sets of the table, n ids.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
from torchrec.modules.mc_modules import ManagedCollisionCollection, ManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor

WAYS = 16
"""Number of rows of a set; ids without an assigned row share the last one."""
SETS = 960
"""The number of sets is a multiple of this, so that 1 to 6, 8, 10, 12, 15, 16, ... ranks divide it."""
_NONE = -1
"""Value of `_zch_ids` for a free row."""


@dataclass(frozen=True)
class HashTable:
    """Settings of a table.

    rows: least number of rows, which is rounded up to a multiple of WAYS * SETS. evict_after: number of training steps
    (micro-batches) after which an unread id can lose its row.
    """

    rows: int
    evict_after: int

    @property
    def sets(self) -> int:
        """G."""
        return SETS * -(-self.rows // (WAYS * SETS))


@dataclass
class HashCounts:
    """Counts of a rank's shard of a table since the last `take_counts`.

    lookups: ids looked up in training; collided: looked-up ids that had no assigned row; admitted: ids that were
    assigned a row; evicted: ids that lost their row to an admitted id; filled: rows that are assigned now.
    """

    lookups: int = 0
    collided: int = 0
    admitted: int = 0
    evicted: int = 0
    filled: int = 0


class SetAssociativeIds(ManagedCollisionModule):
    """Map of ids (any int64) to the rows of a table, or to those of the shard that starts at row `first`."""

    _current_iter_tensor: Tensor
    _zch_ids: Tensor
    _zch_read: Tensor

    def __init__(
        self,
        table: HashTable,
        device: torch.device,
        first: int = 0,
        rows: int | None = None,
        segments: list[int] | None = None,
    ) -> None:
        self.table, self.first = table, first
        self.rows = WAYS * table.sets if rows is None else rows
        super().__init__(device, segments or [first, first + self.rows])
        self._non_persistent_buffers_set.add("_output_segments_tensor")  # it depends on the number of ranks
        # Hash of each row's id, and the last step that read it. One entry per row, so that these buffers are sharded
        # row-wise like the table.
        self.register_buffer("_zch_ids", torch.full((self.rows,), _NONE, dtype=torch.int64, device=device))
        self.register_buffer("_zch_read", torch.full((self.rows,), _NONE, dtype=torch.int64, device=device))
        # An id's hash is set * span + tag, so contiguous ranges of hashes are contiguous sets, which TorchRec's
        # exchange of ids between ranks requires. Two of n ids have the same hash with probability about
        # n^2 / (2 G span), at most n^2 / 2^50.
        self._span = 2 ** min(40, 62 - table.sets.bit_length())
        self._new_rows: Tensor | None = None
        self._counts = HashCounts()

    def preprocess(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Hash the ids."""
        return {name: _with_values(ids, self._hashed(ids.values())) for name, ids in features.items()}

    @torch.no_grad()
    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """In training: record the step as the last one that read these hashed ids, and admit ids without a row."""
        if not self.training:
            return features
        self._current_iter_tensor += 1
        ids, numbers = torch.unique(torch.cat([one.values() for one in features.values()]), return_counts=True)
        rows, known = self._find(ids)
        self._zch_read[rows[known]] = self._current_iter_tensor
        self._admit(ids[~known], numbers[~known])
        return features

    @torch.no_grad()
    def remap(
        self, features: dict[str, JaggedTensor], mutate_miss_lengths: bool = True, write_weights: Tensor | None = None
    ) -> dict[str, JaggedTensor]:
        """Map hashed ids to rows of the table."""
        remapped = {}
        for name, ids in features.items():
            rows, known = self._find(ids.values())
            if self.training:
                self._counts.lookups += known.numel()
                self._counts.collided += int((~known).sum())
            remapped[name] = _with_values(ids, rows + self.first)
        return remapped

    def forward(self, features: dict[str, JaggedTensor], mutate_miss_lengths: bool = True) -> dict[str, JaggedTensor]:
        """Map ids to rows of the table; in training, ids without a row may be assigned one."""
        return self.remap(self.profile(self.preprocess(features)))

    def evict(self) -> Tensor | None:
        """Rows of the table that were assigned to new ids since the last call (TorchRec resets them), or None."""
        rows, self._new_rows = self._new_rows, None
        return rows

    def take_counts(self) -> HashCounts:
        """Return the counts since the last call, and reset them."""
        counts, self._counts = self._counts, HashCounts()
        counts.filled = int((self._zch_ids != _NONE).sum())
        return counts

    def _find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in this shard of hashed ids [n] (the last row of the set for ids without an assigned row), and bool [n],
        True for ids with an assigned row."""
        sets = self._set_of(ids)
        hits = self._zch_ids.view(-1, WAYS)[sets] == ids[:, None]
        known = hits.any(dim=1)
        ways = torch.where(known, hits.to(torch.uint8).argmax(dim=1), WAYS - 1)
        return sets * WAYS + ways, known

    def _admit(self, ids: Tensor, numbers: Tensor) -> None:
        """Assign rows to new ids [n] (ascending), which this step reads `numbers` [n] times: within a set, ids that are
        read more often come first."""
        if not ids.numel():
            return
        # Order by set, within a set by number of reads (descending), then by id: both sorts are stable.
        order = torch.argsort(numbers, descending=True, stable=True)
        order = order[torch.argsort(self._set_of(ids[order]), stable=True)]
        ids = ids[order]
        sets, index = torch.unique_consecutive(self._set_of(ids), return_inverse=True)
        rank = torch.arange(ids.numel(), device=ids.device) - torch.searchsorted(index, index)  # within the set, from 0
        step = self._current_iter_tensor
        read = self._zch_read.view(-1, WAYS)[sets, : WAYS - 1]
        free = (read == _NONE) | (read <= step - self.table.evict_after)
        # Available rows first, those unread for the longest time before the others; unassigned rows have step -1.
        ways = torch.argsort(torch.where(free, read, step + 1), dim=1, stable=True)
        admitted = rank < free.sum(dim=1)[index]
        ids, rows = ids[admitted], (sets[index] * WAYS)[admitted] + ways[index[admitted], rank[admitted]]
        self._counts.admitted += ids.numel()
        self._counts.evicted += int((self._zch_ids[rows] != _NONE).sum())
        self._zch_ids[rows], self._zch_read[rows] = ids, step
        if rows.numel():
            new = rows + self.first
            self._new_rows = new if self._new_rows is None else torch.unique(torch.cat([self._new_rows, new]))

    def _set_of(self, hashed: Tensor) -> Tensor:
        """Index within this shard of the set of each hashed id [n]."""
        return hashed // self._span - self.first // WAYS

    def _hashed(self, ids: Tensor) -> Tensor:
        """Hash ids [n], any int64, to [0, G * span)."""
        mixed = _mix_bits(ids.to(torch.int64)) & (2**63 - 1)
        return mixed % self.table.sets * self._span + mixed // self.table.sets % self._span

    def output_size(self) -> int:
        """Number of rows."""
        return self.rows

    def input_size(self) -> int:
        """Upper bound (exclusive) of hashed ids."""
        return self.table.sets * self._span

    def buckets(self) -> int:
        """Number of equal ranges of hashed ids; TorchRec assigns each range to one rank."""
        return self.table.sets

    def open_slots(self) -> Tensor:
        """Number of unassigned rows, [1]; TorchRec prints it."""
        return (self._zch_ids == _NONE).sum()[None]

    def validate_state(self) -> None:
        """Accept any state (no check)."""

    def rebuild_with_output_id_range(
        self, output_id_range: tuple[int, int], output_segments: list[int], device: torch.device | None = None
    ) -> "SetAssociativeIds":
        """Build the map of a row-wise shard.

        Raises:
            ValueError: the shard does not consist of complete sets.
        """
        first, end = output_id_range
        if first % WAYS or end % WAYS or self.table.sets % (len(output_segments) - 1):
            raise ValueError(hash_ranks_problem(len(output_segments) - 1, self.table))
        return SetAssociativeIds(self.table, device or self.device, first, end - first, output_segments)


def hash_ranks_problem(ranks: int, table: HashTable) -> str:
    """Error message for a number of ranks that does not divide the number of sets."""
    return f"{ranks} ranks: must divide the {table.sets:,} sets of a table of kind hash; take another number of ranks"


def hash_collection(
    tables: Mapping[str, HashTable], width: int, scale: float, device: torch.device | None
) -> ManagedCollisionEmbeddingCollection:
    """Build the tables, each with a feature of its name. All rows of a table start as one vector, uniform in +-scale.

    The vector depends only on the name, so ids that are new, or return after an eviction, start with the same vector.
    """
    configs = [
        EmbeddingConfig(
            name=name,
            embedding_dim=width,
            num_embeddings=WAYS * table.sets,
            feature_names=[name],
            init_fn=partial(_fill_with, start_vector(name, width, scale)),
        )
        for name, table in tables.items()
    ]
    maps: dict[str, ManagedCollisionModule] = {
        name: SetAssociativeIds(table, device or torch.device("cpu")) for name, table in tables.items()
    }
    return ManagedCollisionEmbeddingCollection(
        EmbeddingCollection(configs, device=device), ManagedCollisionCollection(maps, configs)
    )


def start_vector(name: str, width: int, scale: float) -> Tensor:
    """Initial vector [width] of all rows of a table."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (torch.rand(width, generator=generator) * 2 - 1) * scale


def _fill_with(vector: Tensor, rows: Tensor) -> Tensor:
    with torch.no_grad():
        return rows.copy_(vector.to(rows.device, rows.dtype).expand_as(rows))


def _with_values(ids: JaggedTensor, values: Tensor) -> JaggedTensor:
    return JaggedTensor(values, lengths=ids.lengths(), weights=ids.weights_or_none())


def _mix_bits(values: Tensor) -> Tensor:
    """SplitMix64's finalizer: a bijection of int64 [n], in which every output bit depends on all input bits; products
    wrap around."""
    values = (values ^ _shifted(values, 30)) * -4658895280553007687
    values = (values ^ _shifted(values, 27)) * -7723592293110705685
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64; torch's operator is an arithmetic shift."""
    return (values >> bits) & (2 ** (64 - bits) - 1)
