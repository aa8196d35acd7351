"""First pass of `prepare`: streams items, events and users from the source to disk and handles bad rows."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from hllm_torchrec.data.bad_rows import MAX_SECOND, BadRowLog, describe_time
from hllm_torchrec.data.event_partitions import PartitionWriter, RowLocator
from hllm_torchrec.data.events import EVENT_COLUMNS
from hllm_torchrec.data.item_catalogue import ItemCatalogue, blank_mask
from hllm_torchrec.data.sources.base import Chunk, Source

_WRITTEN = ["raw_user_id", *(column.single for column in EVENT_COLUMNS), "order"]


def file_bar(files: tuple[Path, ...], what: str) -> tqdm:
    """A progress bar over the bytes of `files`, shown after five seconds."""
    total = sum(path.stat().st_size for path in files)
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, delay=5)


def read_items(source: Source, catalogue: ItemCatalogue) -> None:
    """Add all items of the source to the catalogue."""
    with file_bar(source.other_files, "reading items") as bar:
        for chunk in source.items():
            catalogue.add(chunk)
            bar.update(chunk.size)


def read_events(
    source: Source, catalogue: ItemCatalogue, log: BadRowLog, locate: RowLocator, writer: PartitionWriter
) -> list[Path]:
    """Write all accepted events, partitioned by user; return the partitions' paths."""
    with file_bar(source.event_files, "reading events") as bar:
        for chunk in source.events():
            writer.write(_checked(chunk, source, catalogue, log, locate))
            bar.update(chunk.size)
    return writer.close()


def read_users(source: Source, log: BadRowLog, writer: PartitionWriter) -> list[Path]:
    """Write the rows of the user file, partitioned by user; return the partitions' paths."""
    for chunk in source.users():
        blank = blank_mask(chunk.table["raw_user_id"])
        table = _handled(log, "missing_id", blank, chunk.table, chunk.path, lambda _: "the user id is missing")
        writer.write(table.drop_columns("row"))
    return writer.close()


def _handled(
    log: BadRowLog, reason: str, bad: np.ndarray, table: pa.Table, path: Path, problem: Callable[[int], str]
) -> pa.Table:
    """`table` without the bad rows if the policy drops them, else unchanged."""
    if log.handle(reason, bad, path, table["row"].to_numpy(), problem):
        return table.filter(pa.array(~bad))
    return table


def _checked(chunk: Chunk, source: Source, catalogue: ItemCatalogue, log: BadRowLog, locate: RowLocator) -> pa.Table:
    """The accepted events of a chunk, with item numbers, seconds and orders."""
    path, table = chunk.path, chunk.table
    # Orders are given before any row is dropped, so that an order maps back to its row in the file.
    table = table.append_column("order", pa.array(locate.orders(path, table["row"].to_numpy())))
    blank = blank_mask(table["raw_user_id"]) | blank_mask(table["raw_item_id"])
    table = _handled(log, "missing_id", blank, table, path, lambda _: "the user id or the item id is missing")
    table = (
        _with_good_times(table, path, log) if source.has_timestamps else _replaced(table, "timestamp", table["order"])
    )
    # null and NaN differ here: null is an event without a label, NaN a label that could not be read.
    unreadable = np.isnan(table["label"].fill_null(0).to_numpy())
    problem = f"the label ({source.label_rule}) is not a number in its range"
    table = _handled(log, "nan_label", unreadable, table, path, lambda _: problem)
    # Unreadable labels that the policy keeps become null: the event stays in the history without a label.
    label = table["label"].to_numpy()
    table = _replaced(table, "label", pa.array(label, pa.float32(), mask=np.isnan(label)))
    return _with_item_numbers(table, path, catalogue, log).select(_WRITTEN)


def _replaced(table: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def _with_good_times(table: pa.Table, path: Path, log: BadRowLog) -> pa.Table:
    text, second = table["time_text"], table["timestamp"]
    value = second.fill_null(-1).to_numpy()
    bad = (value < 0) | (value > MAX_SECOND)
    return _handled(log, "bad_time", bad, table, path, lambda i: describe_time(text[i].as_py(), second[i].as_py()))


def _with_item_numbers(table: pa.Table, path: Path, catalogue: ItemCatalogue, log: BadRowLog) -> pa.Table:
    """Add the column `item`; handle events of unknown items and of dropped items."""
    # Items dropped by the policy are not unknown: their events follow the item's choice, not `unknown_item`.
    refused = catalogue.was_refused(table["raw_item_id"])
    if refused.any():
        log.dropped["event_of_dropped_item"] += int(refused.sum())
        table = table.filter(pa.array(~refused))
    raw, number = table["raw_item_id"], catalogue.look_up(table["raw_item_id"])
    unknown = number < 0
    text = "item {!r} is not in the item file"
    table = _handled(log, "unknown_item", unknown, table, path, lambda i: text.format(raw[i].as_py()))
    if len(table) < len(number):
        number = number[~unknown]
    elif unknown.any():  # the policy is "keep"
        catalogue.add_without_text(raw.filter(pa.array(unknown)).to_pylist())
        number = catalogue.look_up(raw)
    return table.append_column("item", pa.array(number))
