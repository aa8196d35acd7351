"""First pass of `prepare`: streams items, events and users from the source to disk and handles bad rows."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from hllm_torchrec.common.yaml_files import abbreviate
from hllm_torchrec.data.bad_rows import MAX_SECOND, BadRowLog, describe_time
from hllm_torchrec.data.event_partitions import PartitionWriter, RowLocator
from hllm_torchrec.data.event_schema import CONTEXT, LABEL, SAMPLING_RATE, WEIGHT, EventSchema
from hllm_torchrec.data.item_catalogue import ItemCatalogue, Vocabulary, blank_mask
from hllm_torchrec.data.sources.base import Chunk, Source

_EVERY = pa.list_(pa.string())


def file_bar(files: tuple[Path, ...], what: str) -> tqdm:
    """A progress bar over the bytes of `files`, shown after five seconds."""
    total = sum(path.stat().st_size for path in files)
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, delay=5)


def read_items(source: Source, catalogue: ItemCatalogue) -> None:
    """Add all items of the source to the catalogue."""
    log, features = catalogue.log, RepeatedFeatures(source.item_features)
    with file_bar(source.other_files, "reading items") as bar:
        for chunk in source.items():
            log.read("items", chunk.path, chunk.table, chunk.dialect)
            catalogue.add(features.checked(chunk, log))
            bar.update(chunk.size)
    log.check_shares()


def read_events(
    source: Source,
    catalogue: ItemCatalogue,
    log: BadRowLog,
    locate: RowLocator,
    writer: PartitionWriter,
    context_words: Mapping[str, Vocabulary],
) -> list[Path]:
    """Write all accepted events, partitioned by user; return the partitions' paths.

    New values of categorical context are added to `context_words`.
    """
    known, rates = len(catalogue), SamplingRates()
    with file_bar(source.event_files, "reading events") as bar:
        for chunk in source.events():
            log.read("events", chunk.path, chunk.table, chunk.dialect)
            log.facts["events"].is_labelled = source.is_labelled
            table = _checked(chunk, source, catalogue, known, log, locate)
            rates.add(table)
            writer.write(_with_context_ids(table, context_words))
            bar.update(chunk.size)
    log.check_shares()
    rates.check(source)
    return writer.close()


def read_users(source: Source, log: BadRowLog, writer: PartitionWriter) -> list[Path]:
    """Write the rows of the user file, partitioned by user; return the partitions' paths."""
    for chunk in source.users():
        log.read("users", chunk.path, chunk.table, chunk.dialect)
        blank = blank_mask(chunk.table["raw_user_id"])
        table = _handled(log, "missing_id", blank, chunk.table, chunk.path, lambda _: "the user id is missing")
        writer.write(table.drop_columns("row"))
    log.check_shares()
    return writer.close()


def _handled(
    log: BadRowLog, reason: str, bad: np.ndarray, table: pa.Table, path: Path, problem: Callable[[int], str]
) -> pa.Table:
    """`table` without the bad rows if the policy drops them, else unchanged."""
    if log.handle(reason, bad, path, table["row"].to_numpy(), problem):
        return table.filter(pa.array(~bad))
    return table


def _checked(
    chunk: Chunk, source: Source, catalogue: ItemCatalogue, known: int, log: BadRowLog, locate: RowLocator
) -> pa.Table:
    """The accepted events of a chunk with item numbers, seconds and orders.

    known: number of items before the first event: those of the item file and of an existing dataset.
    """
    path, table = chunk.path, chunk.table
    # Assign the orders before any row is dropped, so that an order can be mapped back to its row in the file.
    table = table.append_column("order", pa.array(locate.orders(path, table["row"].to_numpy())))
    blank = blank_mask(table["raw_user_id"]) | blank_mask(table["raw_item_id"])
    table = _handled(log, "missing_id", blank, table, path, lambda _: "the user id or the item id is missing")
    table = (
        _with_good_times(table, path, log) if source.has_timestamps else _replaced(table, "timestamp", table["order"])
    )
    # null and NaN differ here: null is an event without a label, NaN a label that could not be read.
    unreadable = np.isnan(table["label"].fill_null(0).to_numpy())
    texts, problem = table["text_of_label"], f"the label ({source.label_rule}) is not a number in its range"
    table = _handled(log, "nan_label", unreadable, table, path, lambda i: problem + _shown(texts[i].as_py()))
    # Unreadable labels that the policy keeps become null: the event stays in the history without a label.
    label = table["label"].to_numpy()
    table = _replaced(table, "label", pa.array(label, pa.float32(), mask=np.isnan(label)))
    table = _with_defined_labels(table, path, source.schema, log)
    names = ["raw_user_id", *(column.single for column in source.schema.columns), "order"]
    return _with_item_numbers(table, path, catalogue, known, log).select(names)


def _with_defined_labels(table: pa.Table, path: Path, schema: EventSchema, log: BadRowLog) -> pa.Table:
    """The events with their declared columns checked, and labels only where they are defined.

    A label or numeric context that cannot be read, or a label that is given although the first label is missing, is a
    bad row of the kind `nan_label`. So is a weight or rate outside its range, but such rows cannot be kept.
    """
    categories = [f"{CONTEXT}{name}" for name in schema.categorical]
    for column in (one for one in schema.extra if one.name not in categories):
        values, absent = table[column.single].fill_null(0).to_numpy(), table[column.single].is_null().to_numpy()
        bad, rule = schema.broken_rule(column.name, np.where(absent, np.float32(1), values))
        if column.name in (WEIGHT, SAMPLING_RATE):
            bad = bad | absent
            table = _required(table, path, column.name, bad, rule, log)
            continue
        bad = (bad | np.isnan(values)) & ~absent
        # Set to null before the policy is applied: a kept row then has no such label, or unknown context.
        table = _replaced(table, column.single, pa.array(values, pa.float32(), mask=absent | bad))
        table = _handled(log, "nan_label", bad, table, path, _says(f"{rule}; it is another value"))
    for label in schema.labels[1:]:
        first, values = table["label"], table[label.column]
        undefined = first.is_null().to_numpy() & values.is_valid().to_numpy()
        problem = f"the label {label.name} is given, but the first label, {schema.labels[0].name}, is not"
        table = _handled(log, "nan_label", undefined, table, path, _says(problem))
        defined = table["label"].is_valid()
        if label.given is not None:
            condition = table["label" if label.given == schema.labels[0].name else f"{LABEL}{label.given}"]
            defined = pc.fill_null(pc.equal(condition, 1), False)
        table = _replaced(table, label.column, pc.if_else(defined, table[label.column], pa.scalar(None, pa.float32())))
    return table


def _shown(text: str | None) -> str:
    """The end of a message about a cell; empty for a missing one."""
    return "" if text is None else f": {text[:200]}{'...' * (len(text) > 200)}"


def _says(problem: str) -> Callable[[int], str]:
    """A function that returns `problem` for every row."""
    return lambda _: problem


def _required(table: pa.Table, path: Path, name: str, bad: np.ndarray, rule: str, log: BadRowLog) -> pa.Table:
    """`table` without the rows whose weight or rate is bad. Raises ValueError if the policy is not to drop them."""
    if not bad.any():
        return table
    if log.policy.nan_label != "drop":
        row = int(bad.argmax())
        value = table[name][row].as_py()
        shown = "empty" if value is None else f"{value:g}"
        raise ValueError(
            f"{path}, row {table['row'][row].as_py()}: {name} is {shown}; {rule}. Correct the row, or drop such rows "
            "(--bad-rows nan_label=drop)"
        )
    log.count("nan_label", int(bad.sum()))
    return table.filter(pa.array(~bad))


def _with_context_ids(table: pa.Table, words: Mapping[str, Vocabulary]) -> pa.Table:
    """`table` with the ids of categorical context instead of its values; null becomes 0."""
    for name, vocabulary in words.items():
        values = table[f"{CONTEXT}{name}"].combine_chunks()
        known = values.is_valid().to_numpy(zero_copy_only=False)
        lists = pa.ListArray.from_arrays(np.append(0, np.cumsum(known)).astype(np.int32), values.drop_null())
        ids = np.zeros(len(values), np.int32)
        ids[known] = vocabulary.encode(lists.cast(_EVERY)).flatten().to_numpy()
        table = _replaced(table, f"{CONTEXT}{name}", pa.array(ids))
    return table


class SamplingRates:
    """Detects sampling rates that were written per row: 1 on every positive row, less than 1 on every negative row.

    -log(rate) is added to a row's logit as a correction, so such rates would leak the label.
    """

    def __init__(self) -> None:
        self._lowest_of_positive, self._highest_of_negative = np.inf, -np.inf

    def add(self, table: pa.Table) -> None:
        """Record the rates of a chunk of events."""
        if SAMPLING_RATE in table.column_names:
            label, rate = table["label"].fill_null(np.nan).to_numpy(), table[SAMPLING_RATE].to_numpy()
            self._lowest_of_positive = rate[label == 1].min(initial=self._lowest_of_positive)
            self._highest_of_negative = rate[label == 0].max(initial=self._highest_of_negative)

    def check(self, source: Source) -> None:
        """Raise ValueError if the rates differ by label, as described in the class docstring."""
        if self._lowest_of_positive == 1 and -np.inf < self._highest_of_negative < 1:
            raise ValueError(
                f"{source.event_files[0]}: {SAMPLING_RATE} is 1 on every positive exposure and below 1 on every other: "
                "it must be the share of negative exposures that was kept where a row comes from, on its positive rows "
                "too; correct the column"
            )


def _replaced(table: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def _with_good_times(table: pa.Table, path: Path, log: BadRowLog) -> pa.Table:
    text, second = table["time_text"], table["timestamp"]
    value = second.fill_null(-1).to_numpy()
    bad = (value < 0) | (value > MAX_SECOND)
    remedy = ". Set the time unit to "
    return _handled(
        log, "bad_time", bad, table, path, lambda i: describe_time(text[i].as_py(), second[i].as_py(), remedy)
    )


def _with_item_numbers(table: pa.Table, path: Path, catalogue: ItemCatalogue, known: int, log: BadRowLog) -> pa.Table:
    """Add the column `item`; handle events of unknown items and of dropped items."""
    # Items that the policy dropped are not unknown, so their events are dropped without applying `unknown_item`.
    refused = catalogue.was_refused(table["raw_item_id"])
    if refused.any():
        log.count("event_of_dropped_item", int(refused.sum()))
        table = table.filter(pa.array(~refused))
    raw, number = table["raw_item_id"], catalogue.look_up(table["raw_item_id"])
    # Numbers from `known` on are items that an earlier chunk added without text: their events are counted, too.
    unknown = (number < 0) | (number >= known)
    if unknown.any() and "unknown_item" not in log.hints:
        log.hints |= _unknown_hint(raw, unknown, table["raw_user_id"], catalogue)
    hint = f" ({log.hints['unknown_item']})" if "unknown_item" in log.hints else ""
    text = "item {} is not in the item file{}"
    table = _handled(log, "unknown_item", unknown, table, path, lambda i: text.format(abbreviate(raw[i].as_py()), hint))
    if len(table) < len(number):
        number = number[~unknown]
    elif (number < 0).any():  # the policy is "keep"
        catalogue.add_without_text(raw.filter(pa.array(number < 0)).to_pylist())
        number = catalogue.look_up(raw)
    return table.append_column("item", pa.array(number))


def _unknown_hint(
    raw: pa.ChunkedArray, unknown: np.ndarray, users: pa.ChunkedArray, catalogue: ItemCatalogue
) -> dict[str, str]:
    """The likely cause of unknown items, if the ids show one; otherwise empty."""
    some = raw.filter(pa.array(unknown)).slice(0, 1000).combine_chunks().cast(pa.large_string())
    if (catalogue.look_up(users.slice(0, 1000)) >= 0).mean() > 0.5:
        return {"unknown_item": "users and items have changed places: the ids of the users are in the item file"}
    items = catalogue.ids(_MOST_COMPARED)
    for what, form in _SPELLINGS.items():
        at = pc.index_in(form(some), value_set=form(items))
        found = np.flatnonzero(at.is_valid().to_numpy(zero_copy_only=False))
        if len(found) > 0.5 * len(some):
            first = int(found[0])
            return {
                "unknown_item": f"{what}: {abbreviate(some[first].as_py())} in the events, "
                f"{abbreviate(items[at[first].as_py()].as_py())} in the items"
            }
    return {}


def _without_zeros(ids: pa.Array) -> pa.Array:
    shorter = pc.utf8_ltrim(ids, "0")
    return pc.if_else(pc.equal(shorter, ""), ids, shorter)  # an id of zeros alone


_MOST_COMPARED = 1_000_000
"""Maximum number of items with which unknown ids are compared in each spelling."""

_SPELLINGS: dict[str, Callable[[pa.Array], pa.Array]] = {
    "ids became floats": lambda ids: pc.replace_substring_regex(ids, r"\.0+$", ""),
    "ids have blanks around them": pc.utf8_trim_whitespace,
    "ids lost or gained leading zeros": _without_zeros,
    "ids are in another case": pc.utf8_lower,
    "ids are in another Unicode form": lambda ids: pc.utf8_normalize(ids, "NFKC"),
}
"""Cause -> function that, if this is the cause, makes the ids of the events equal to those of the items."""


class RepeatedFeatures:
    """Finds rows whose features differ from those of the first row of the same item, as in a file with a row per genre.

    Such rows are bad rows of the kind `duplicate_item`, because one of the values would be lost.
    """

    def __init__(self, features: tuple[str, ...]) -> None:
        self._columns = [f"feature_{name}" for name in features]
        self._digests: dict[str, int] = {}

    def checked(self, chunk: Chunk, log: BadRowLog) -> Chunk:
        """The chunk without the rows that the policy drops. Raises ValueError if the policy is "error"."""
        if not self._columns:
            return chunk
        table = chunk.table
        values = zip(*(table[name].to_pylist() for name in self._columns), strict=True)
        # Digests are compared within this process only, so Python's salted hash is enough.
        digests = [hash(tuple(tuple(cell or ()) for cell in row)) for row in values]
        ids = table["raw_item_id"].to_pylist()
        differs = np.array([self._digests.setdefault(i, d) != d for i, d in zip(ids, digests)], bool)
        problem = f"came before with other values of {' or '.join(n.removeprefix('feature_') for n in self._columns)}"
        kept = _handled(
            log, "duplicate_item", differs, table, chunk.path,
            lambda i: f"item {abbreviate(ids[i])} {problem}; write one row per item, with all values in it",
        )  # fmt: skip
        return replace(chunk, table=kept)
