"""First half of every preparation: reads a source to disk, handles bad rows, and sorts the events by user."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from hllm_torchrec.data.bad_rows import BadRowLog, BadRows
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.event_partitions import (
    PartitionWriter,
    RowLocator,
    SortedPartitions,
    partition_count,
    read_stream,
    sort_partition,
    write_sorted,
)
from hllm_torchrec.data.forgotten_rows import without_forgotten
from hllm_torchrec.data.ingest import read_events, read_items, read_users
from hllm_torchrec.data.item_catalogue import ItemCatalogue, Vocabulary, check_text_columns, load_vocabularies
from hllm_torchrec.data.sources.base import Source
from hllm_torchrec.data.tombstones import Tombstones
from hllm_torchrec.data.user_table import UserTable


@dataclass(frozen=True)
class Staged:
    """A source on disk: sorted events with user and item numbers, and the tables that map numbers to ids."""

    partitions: SortedPartitions
    catalogue: ItemCatalogue
    users: UserTable
    user_files: list[Path]
    item_words: dict[str, Vocabulary]
    user_words: dict[str, Vocabulary]
    context_words: dict[str, Vocabulary]
    log: BadRowLog
    locate: RowLocator


def stage(
    source: Source,
    policy: BadRows,
    partitions: int,
    scratch: Path,
    old: Dataset | None,
    *,
    with_rows: bool = True,
    forgotten: Tombstones | None = None,
) -> Staged:
    """Read a source into the folder `scratch`; items, users and feature values of `old`, if any, keep their ids.

    with_rows: also put the rows of the items of `old` into the catalogue; forgotten: ids whose rows are left out and
    counted.

    Raises:
        ValueError: a row is bad (see `bad_rows.BadRows`), two kinds of features (item, user, context) have the same
            name, a text column has a reserved name, or ids of users are written in two ways.
    """
    context = source.schema.categorical
    names = Counter((*source.item_features, *source.user_features, *context))
    clash = sorted(name for name, number in names.items() if number > 1)
    if clash:  # all kinds of features share the folder `features/` and the keys of the batch
        raise ValueError(f"{source.name}: {clash} names features of two kinds (item, user, context); rename one")
    check_text_columns(source)
    log, locate, users = BadRowLog(policy), RowLocator(), UserTable(old)
    source = without_forgotten(source, forgotten or Tombstones(), log)
    item_words, user_words = load_vocabularies(old, source.item_features), load_vocabularies(old, source.user_features)
    context_words = load_vocabularies(old, context)
    catalogue = ItemCatalogue(source, scratch / "items.arrows", log)
    if old is not None:
        catalogue.load(old, with_rows=with_rows)
    # Items first, because an event of an item that is not in the catalogue is a bad row.
    read_items(source, catalogue)
    writer = PartitionWriter(scratch, "events", partitions)
    event_files = read_events(source, catalogue, log, locate, writer, context_words)
    # Same number of partitions and same hash as for the events, so that partition k of both has the same users.
    user_files = read_users(source, log, PartitionWriter(scratch, "users", partitions))
    sorted_events = _sort(event_files, users, log, locate)
    if pair := users.float_spelling():
        raise ValueError(
            f"{source.event_files[0]}: both {pair[0]} and {pair[1]} are ids of users: in some files the ids became "
            "floats, as pandas writes them if some are missing; write all ids in one way"
        )
    return Staged(sorted_events, catalogue, users, user_files, item_words, user_words, context_words, log, locate)


def default_partitions(source: Source) -> int:
    """Number of partitions for a source; see `partition_count`."""
    size = sum(path.stat().st_size for path in source.event_files)
    return partition_count(size, any(path.suffix in (".gz", ".parquet") for path in source.event_files))


def _sort(event_files: list[Path], users: UserTable, log: BadRowLog, locate: RowLocator) -> SortedPartitions:
    """Sort each partition in place and number its users."""
    paths = []
    for path in tqdm(event_files, desc="sorting", delay=5):
        table = read_stream(path)
        if table is None:
            users.raw_ids.append(pa.array([], pa.string()))  # keeps raw_ids aligned with the user files
            continue
        table, raw_ids = sort_partition(table, len(users), log, locate)
        users.raw_ids.append(raw_ids)
        write_sorted(path, table)
        paths.append(path)
    return SortedPartitions(paths)
