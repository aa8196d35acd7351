"""Tables of an open vocabulary: ids without end share a fixed number of rows, and no two ids share one that is theirs.

TorchRec's managed collisions (ZCH) with a set-associative map. An id hashes to one set of WAYS rows. In training an id
that has no row takes a free one of its set, or that of an id which no step has read for `evict_after` steps (the
longest unread first); its row and optimizer state then begin anew. If there is none, and in evaluation, the id reads
the last row of its set, which belongs to all ids of the set without one of their own.

    set(id) = hash(id) mod G         row(id) = WAYS * set(id) + way(id)

Every lookup and admission touches the sets of the batch's ids alone, so the cost does not depend on the size of the
table. Sets are contiguous rows: a row-wise shard holds whole sets, and a checkpoint loads at any number of ranks that
divides the number of sets. Which rows ids get is a function of the steps' ids, not of the number of ranks.

Legend: Z rows (of a shard), G sets of the table, n ids.
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
"""Rows of a set; the last one is that of the ids without a row of their own."""
SETS = 960
"""The number of sets is a multiple of it, so that many numbers of ranks divide it (1 to 6, 8, 10, 12, 15, 16, ...)."""
_NONE = -1
"""In place of an id: the row is free."""


@dataclass(frozen=True)
class HashTable:
    """Settings of a table.

    rows: at least this many; rounded up to a multiple of WAYS * SETS. evict_after: training steps (micro-batches).
    """

    rows: int
    evict_after: int

    @property
    def sets(self) -> int:
        """G."""
        return SETS * -(-self.rows // (WAYS * SETS))


@dataclass
class HashCounts:
    """Events of a rank's part of a table since the last `take_counts`.

    lookups: ids looked up in training; collided: those of them that had no row of their own; admitted: ids that got a
    row; evicted: ids that lost theirs to one of them; filled: rows that have an id now.
    """

    lookups: int = 0
    collided: int = 0
    admitted: int = 0
    evicted: int = 0
    filled: int = 0


class SetAssociativeIds(ManagedCollisionModule):
    """Map of ids (any int64) to the rows of a table, or of the shard of it that starts at row `first`."""

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
        # By row, so that row-wise shards of them fit those of the table: hash of the id, and the last step to read it.
        self.register_buffer("_zch_ids", torch.full((self.rows,), _NONE, dtype=torch.int64, device=device))
        self.register_buffer("_zch_read", torch.full((self.rows,), _NONE, dtype=torch.int64, device=device))
        # An id's hash is set * span + tag: contiguous ranges of hashes are contiguous sets, as TorchRec's exchange of
        # ids between ranks needs it. Two ids of the same hash: probability about n^2 / 2^60.
        self._span = 2 ** min(40, 62 - table.sets.bit_length())
        self._new_rows: Tensor | None = None
        self._counts = HashCounts()

    def preprocess(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Hash the ids."""
        return {name: _with_values(ids, self._hashed(ids.values())) for name, ids in features.items()}

    @torch.no_grad()
    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """In training: note that a step reads these hashed ids, and admit those without a row."""
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
        """Hashed ids -> rows of the table."""
        found = {}
        for name, ids in features.items():
            rows, known = self._find(ids.values())
            if self.training:
                self._counts.lookups += known.numel()
                self._counts.collided += int((~known).sum())
            found[name] = _with_values(ids, rows + self.first)
        return found

    def forward(self, features: dict[str, JaggedTensor], mutate_miss_lengths: bool = True) -> dict[str, JaggedTensor]:
        """Ids -> rows of the table; in training, ids without a row may get one."""
        return self.remap(self.profile(self.preprocess(features)))

    def evict(self) -> Tensor | None:
        """Rows of the table that have had another id, or none, until now: they are to begin anew; None: no row."""
        rows, self._new_rows = self._new_rows, None
        return rows

    def take_counts(self) -> HashCounts:
        """The counts since the last call, which begin anew."""
        counts, self._counts = self._counts, HashCounts()
        counts.filled = int((self._zch_ids != _NONE).sum())
        return counts

    def _find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hashed ids [n] -> their rows in this shard, the last of the set if they have none, and which have one."""
        sets = self._set_of(ids)
        hits = self._zch_ids.view(-1, WAYS)[sets] == ids[:, None]
        known = hits.any(dim=1)
        ways = torch.where(known, hits.to(torch.uint8).argmax(dim=1), WAYS - 1)
        return sets * WAYS + ways, known

    def _admit(self, ids: Tensor, numbers: Tensor) -> None:
        """Give rows to new ids [n] (ascending), read `numbers` [n] times by this step: the most read of a set first."""
        if not ids.numel():
            return
        # Sets ascend with the ids. Within a set: by number of reads, then by id.
        order = torch.argsort(numbers, descending=True, stable=True)
        order = order[torch.argsort(self._set_of(ids[order]), stable=True)]
        ids = ids[order]
        sets, index = torch.unique_consecutive(self._set_of(ids), return_inverse=True)
        place = torch.arange(ids.numel(), device=ids.device) - torch.searchsorted(index, index)
        step = self._current_iter_tensor
        read = self._zch_read.view(-1, WAYS)[sets, : WAYS - 1]
        free = (read == _NONE) | (read <= step - self.table.evict_after)
        # Free rows first, the longest unread before the others; a row without an id was read at step -1.
        ways = torch.argsort(torch.where(free, read, step + 1), dim=1, stable=True)
        kept = place < free.sum(dim=1)[index]
        ids, rows = ids[kept], (sets[index] * WAYS)[kept] + ways[index[kept], place[kept]]
        self._counts.admitted += ids.numel()
        self._counts.evicted += int((self._zch_ids[rows] != _NONE).sum())
        self._zch_ids[rows], self._zch_read[rows] = ids, step
        if rows.numel():
            new = rows + self.first
            self._new_rows = new if self._new_rows is None else torch.unique(torch.cat([self._new_rows, new]))

    def _set_of(self, hashed: Tensor) -> Tensor:
        """Set in this shard of hashed ids [n]."""
        return hashed // self._span - self.first // WAYS

    def _hashed(self, ids: Tensor) -> Tensor:
        """Map ids [n], any int64, to [0, G * span)."""
        mixed = _mix_bits(ids.to(torch.int64)) & (2**63 - 1)
        return mixed % self.table.sets * self._span + mixed // self.table.sets % self._span

    def output_size(self) -> int:
        """Number of rows."""
        return self.rows

    def input_size(self) -> int:
        """Hashed ids are below it."""
        return self.table.sets * self._span

    def buckets(self) -> int:
        """Number of equal ranges of hashed ids, each of which is on one rank."""
        return self.table.sets

    def open_slots(self) -> Tensor:
        """Number of rows without an id, [1]; TorchRec prints it."""
        return (self._zch_ids == _NONE).sum()[None]

    def validate_state(self) -> None:
        """Any state fits."""

    def rebuild_with_output_id_range(
        self, output_id_range: tuple[int, int], output_segments: list[int], device: torch.device | None = None
    ) -> "SetAssociativeIds":
        """The map of a row-wise shard.

        Raises:
            ValueError: the shard does not hold whole sets.
        """
        first, end = output_id_range
        if first % WAYS or end % WAYS or self.table.sets % (len(output_segments) - 1):
            raise ValueError(hash_ranks_problem(len(output_segments) - 1, self.table))
        return SetAssociativeIds(self.table, device or self.device, first, end - first, output_segments)


def hash_ranks_problem(ranks: int, table: HashTable) -> str:
    """The message for a number of ranks that does not divide the number of sets."""
    return f"{ranks} ranks: must divide the {table.sets:,} sets of a table of kind hash; take another number of ranks"


def hash_collection(
    tables: Mapping[str, HashTable], width: int, scale: float, device: torch.device | None
) -> ManagedCollisionEmbeddingCollection:
    """Build the tables, each with a feature of its name. All rows of a table start with one vector, uniform in +-scale.

    That vector depends on the name alone: an id that is new, or comes back, starts like every other.
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
    """The vector [width] with which the rows of a table start."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (torch.rand(width, generator=generator) * 2 - 1) * scale


def _fill_with(vector: Tensor, rows: Tensor) -> Tensor:
    with torch.no_grad():
        return rows.copy_(vector.to(rows.device, rows.dtype).expand_as(rows))


def _with_values(ids: JaggedTensor, values: Tensor) -> JaggedTensor:
    return JaggedTensor(values, lengths=ids.lengths(), weights=ids.weights_or_none())


def _mix_bits(values: Tensor) -> Tensor:
    """SplitMix64's finalizer: a bijection of int64 [n] whose bits all depend on all bits; products wrap around."""
    values = (values ^ _shifted(values, 30)) * -4658895280553007687
    values = (values ^ _shifted(values, 27)) * -7723592293110705685
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's is arithmetic."""
    return (values >> bits) & (2 ** (64 - bits) - 1)
