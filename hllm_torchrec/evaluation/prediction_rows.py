"""Validated rows of prediction files: labels, weights, scores of one or more models, users and slices.

The files are read once: every batch has the columns of the first label and of all further tasks.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import Doubles
from hllm_torchrec.common.hashing import hash_columns
from hllm_torchrec.common.yaml_files import abbreviate
from hllm_torchrec.data.bad_rows import MAX_SECOND, describe_time
from hllm_torchrec.data.validation import error_location
from hllm_torchrec.evaluation.prediction_files import (
    RowReader,
    are_absent,
    column_names,
    encoded,
    find_files,
    identities,
    seconds_of,
)
from hllm_torchrec.evaluation.prediction_layout import RAW, ColumnLayout, PredictionModel, label_of, task_columns
from hllm_torchrec.evaluation.prediction_pairing import PAIR_COLUMNS, PairedTables, Tables
from hllm_torchrec.evaluation.row_batch import ReadRows, RowBatch, without_zero_weights
from hllm_torchrec.evaluation.row_slices import Slices, cold_slices, history_slices, item_slices, time_slices
from hllm_torchrec.metrics.group_auc import NO_USER
from hllm_torchrec.metrics.input_checks import WEIGHT_RANGE

MEMORY = 1 << 30
"""Default of `memory`: bytes for rows per rank."""

MOST_EXACT = (1 << 53) - 1
"""float64 distinguishes all whole numbers up to this magnitude."""

_TRUE, _FALSE = ["true", "1"], ["false", "0"]

Rows = Mapping[str, np.ndarray]
"""Model → row numbers in its files [n], for messages."""


class PredictionRows:
    """Reads the rows of all models together; every rank reads its own share."""

    def __init__(
        self,
        models: Sequence[PredictionModel],
        layout: ColumnLayout,
        folder: Path,
        known_items: np.ndarray | None = None,
        *,
        paired: bool = False,
        memory: int = MEMORY,
        item_events: np.ndarray | None = None,
    ):
        """Open the files; CSV files are rewritten into `folder`.

        Args:
            known_items: items of the training part, from the function `known_items`; all others are cold, unless
                `layout.item_is_cold` says which items are.
            paired: rows are paired by `PAIR_COLUMNS`, in any order, instead of by their position in the files. The
                first call of `read` is then collective, because it pairs the rows.
            memory: bytes per rank for pairing.
            item_events: [N] number of training events by item id, if the items are dense ids of a dataset.

        Raises:
            ValueError: a file is missing or does not have a column, or a model has another number of rows than the
                first model and the rows are not paired.
        """
        self.models, self.layout, self._known_items = list(models), layout, known_items
        self._item_events = item_events
        self._paired, self._memory, self._folder = paired, memory, folder
        self._tables: PairedTables | None = None
        self.files = {model.name: find_files(model.files) for model in models}
        self._ids = {model.name: self._shared_ids(model.name) for model in models[1:]}
        self.readers = {}
        for place, model in enumerate(models):
            columns = [name for name in (model.score, model.probability) if name]
            numbers = [
                *columns,
                *(name for name in (layout.label, layout.weight, layout.history_length, layout.timestamp) if name),
            ]
            # Shared columns are read from the first model only; labels and ids from all, to check that they agree.
            columns += layout.all if place == 0 else [layout.label, *self._ids[model.name]]
            columns += PAIR_COLUMNS if paired else ()
            for task in layout.tasks:
                if found := self._task_columns(model, task):
                    columns += [label_of(task), *found]
                    numbers += [label_of(task), *found]
            self.readers[model.name] = RowReader(self.files[model.name], columns, folder, numbers)
        first = self.readers[models[0].name]
        for name, reader in self.readers.items():
            if reader.rows != first.rows and not paired:
                raise ValueError(
                    f"{name!r} has {reader.rows:,} rows, {models[0].name!r} {first.rows:,}; models are compared row "
                    "by row: write both in one order, or put both scores into one file (--score)"
                )
        self.rows = first.rows
        self.weighted, self.has_users = layout.weight is not None, layout.user is not None

    def _task_columns(self, model: PredictionModel, task: str) -> tuple[str, str] | None:
        """Columns of a model's score and prediction for a further task; None if the model's files lack them.

        For a model before calibration, the prediction is the probability before calibration.
        """
        score, prediction = task_columns(task, self.layout.tasks[task])
        if model.probability is not None and model.probability.startswith(RAW):
            prediction = f"{RAW}{prediction}"
        wanted = {label_of(task), score, prediction}
        has = all(wanted <= set(column_names(file)) for file in self.files[model.name])
        return (score, prediction) if has else None

    def of_task(self, task: str) -> "PredictionRows":
        """A copy with the label of a further task and the models that predict it; the copy shares the open files."""
        own, binary = copy(self), self.layout.tasks[task] == "binary"
        own.layout = replace(self.layout, label=label_of(task), tasks={})
        own.models = [
            replace(model, score=found[0], probability=found[1] if binary else None)
            for model in self.models
            if (found := self._task_columns(model, task))
        ]
        return own

    def _shared_ids(self, name: str) -> list[str]:
        """Columns of ids in a model's files that must equal the first model's, row by row."""
        files, first = self.files[name], self.files[self.models[0].name]
        columns = [self.layout.item] if self._paired else [self.layout.user, self.layout.item]
        if files == first:
            return []
        return [column for column in columns if column and all(column in column_names(file) for file in files)]

    def score_type(self, model: PredictionModel) -> np.dtype:
        """A type that keeps the order of scores: int64 for whole numbers and decimals (`_scaled`), float32 for floats
        of 16 or 32 bits, else float64.
        """
        kinds = self._score_kinds(model)
        if all(map(pa.types.is_decimal, kinds)):
            return np.dtype(np.int64)
        if all(pa.types.is_integer(kind) for kind in kinds) and len({kind == pa.uint64() for kind in kinds}) == 1:
            return np.dtype(np.int64)
        small = all(kind in (pa.float16(), pa.float32()) for kind in kinds)
        return np.dtype(np.float32 if small else np.float64)

    def _score_kinds(self, model: PredictionModel) -> list[pa.DataType]:
        """Type of the model's scores in each of its files."""
        return [schema.field(model.score).type for schema in self.readers[model.name].schemas]

    def read(self, rank: int, world_size: int, size: int) -> Iterator[ReadRows]:
        """Read the rank's share of the rows, at most `size` at a time.

        The share is a contiguous range of rows or, if rows are paired, the rows of some users. Collective at the
        first call if rows are paired.

        Raises:
            ValueError: a bad value, with its file and row.
        """
        tasks = {task: self.of_task(task) for task in self.layout.tasks}
        for start, tables in self._tables_of(rank, world_size, size):
            every = self._batch(tables)
            of_tasks = {
                task: own._task_batch(tables, every) if kind == "binary" else own._task_numbers(tables, every, task)
                for (task, kind), own in zip(self.layout.tasks.items(), tasks.values(), strict=True)
            }
            yield ReadRows(start, without_zero_weights(every), of_tasks)

    def _tables_of(self, rank: int, world_size: int, size: int) -> Iterator[tuple[int, Tables]]:
        """(number of the first row, see `ReadRows`; the tables)."""
        if not self._paired:
            return self._stretches(rank, world_size, size)
        if self._tables is None:
            self._tables = PairedTables(self.readers, self._memory, self._folder)
        return self._tables.batches(size)

    @property
    def spilled(self) -> int:
        """Number of bytes written to disk on this rank."""
        return self._tables.spilled if self._tables else 0

    def _stretches(self, rank: int, world_size: int, size: int) -> Iterator[tuple[int, Tables]]:
        # Row i of every file belongs together: all models read the same range, in batches of the same size.
        low, high = self.rows * rank // world_size, self.rows * (rank + 1) // world_size
        streams = [self.readers[model.name].batches(low, high, size) for model in self.models]
        start = 0
        for tables in zip(*streams, strict=True):
            rows = np.arange(low + start, low + start + len(tables[0]))
            yield start, {name: (table, rows) for name, table in zip(self.readers, tables)}
            start += len(rows)

    def _batch(self, read: Tables) -> RowBatch:
        """All rows, those of weight 0 included."""
        first, layout = self.models[0], self.layout
        tables, rows = _unzipped(read)
        table = tables[first.name]
        is_positive = self._labels(tables, rows)
        weights = self._weights(table, rows) if layout.weight else None
        scores = {model.name: self._scores(model, tables[model.name], rows) for model in self.models}
        probabilities = self._all_probabilities(tables, rows)
        users = self._identities(table, layout.user)
        items = self._identities(table, layout.item)
        self._check_ids(tables, {layout.user: users, layout.item: items}, rows)
        # Keys come from the shared columns, not from the scores, so runs on the same exposures have one fingerprint.
        keys = row_keys(is_positive, weights, users, items)
        slices = self._slices(table, rows, items)
        if users is not None and (null := are_absent(table[layout.user])).any():
            users = np.where(null, NO_USER + rows[first.name], users)
        return RowBatch(is_positive, weights, scores, probabilities, users, keys, slices)

    def _task_batch(self, read: Tables, every: RowBatch) -> RowBatch:
        """The rows of a binary task (`of_task`); every: all rows of the first label."""
        defined, kept = self._defined(read)
        tables, rows = _unzipped(defined)
        is_positive = self._labels(tables, rows)
        weights, users = (None if column is None else column[kept] for column in (every.weights, every.users))
        scores = {model.name: self._scores(model, tables[model.name], rows) for model in self.models}
        probabilities, table = self._all_probabilities(tables, rows), tables[self.models[0].name]
        items = None if self._known_items is None else self._identities(table, self.layout.item)
        slices = self._slices(table, rows, items)
        no_keys = np.empty(0, np.uint64)
        return without_zero_weights(RowBatch(is_positive, weights, scores, probabilities, users, no_keys, slices))

    def _task_numbers(self, read: Tables, every: RowBatch, task: str) -> Doubles:
        """The rows of a task that predicts numbers (`of_task`): see `ReadRows`."""
        defined, kept = self._defined(read)
        tables, rows = _unzipped(defined)
        labels = self._equal_labels(tables, rows)
        weights = np.ones(len(labels)) if every.weights is None else every.weights[kept]
        prediction = task_columns(task, "number")[1]
        columns = [self._numbers(model.name, tables[model.name], prediction, rows) for model in self.models]
        return np.stack([labels, weights, *columns], axis=1).astype(np.float64)[weights > 0]

    def _defined(self, read: Tables) -> tuple[Tables, NDArray[np.bool_]]:
        """All models' rows for which the first model's files have a label, and the mask of these rows."""
        first = self.models[0].name
        kept = ~np.isnan(self._values(first, read[first][0], self.layout.label))
        mask = pa.array(kept)
        names = [model.name for model in self.models]
        return {name: (read[name][0].filter(mask), read[name][1][kept]) for name in names}, kept

    def _identities(self, table: pa.Table, column: str | None) -> np.ndarray | None:
        if not column:
            return None
        with error_location(
            f"column {column!r} of {self.files[self.models[0].name][0]}", "it must hold numbers or text"
        ):
            return identities(table[column])

    def _labels(self, tables: Mapping[str, pa.Table], rows: Rows) -> np.ndarray:
        first = self.models[0].name
        labels = self._numbers(first, tables[first], self.layout.label, rows)
        good = (labels == 0) | (labels == 1)
        self._check(first, self.layout.label, labels, good, rows, "a label is 0 or 1; remove the row")
        return self._equal_labels(tables, rows) == 1

    def _equal_labels(self, tables: Mapping[str, pa.Table], rows: Rows) -> np.ndarray:
        """The first model's labels, which the files of all models must have."""
        columns = {name: self._numbers(name, table, self.layout.label, rows) for name, table in tables.items()}
        first = self.models[0].name
        for name, other in columns.items():
            rule = f"it differs from the files of {first!r}; {self._remedy}"
            self._check(name, self.layout.label, other, other == columns[first], rows, rule)
        return columns[first]

    @property
    def _remedy(self) -> str:
        if self._paired:
            return "predict with each on the same dataset and split"
        return "models are compared row by row: write both in one order"

    def _check_ids(
        self, tables: Mapping[str, pa.Table], ids: Mapping[str | None, np.ndarray | None], rows: Rows
    ) -> None:
        """Raise ValueError if ids in the files of another model differ from the first model's."""
        first, *others = tables
        for name in others:
            for column in self._ids[name]:
                same = identities(tables[name][column]) == ids[column]
                if not same.all():
                    row = int((~same).argmax())
                    place = self.readers[name].locate(int(rows[name][row]))
                    own, expected = (abbreviate(tables[model][column][row].as_py()) for model in (name, first))
                    raise ValueError(
                        f"{place}: column {column!r} is {own}, not {expected}; it differs from the files of {first!r}; "
                        f"{self._remedy}"
                    )

    def _weights(self, table: pa.Table, rows: Rows) -> np.ndarray:
        assert self.layout.weight
        weights = self._numbers(self.models[0].name, table, self.layout.weight, rows).astype(np.float64)
        low, high = WEIGHT_RANGE
        good = (weights == 0) | ((weights >= low) & (weights <= high))
        rule = f"a weight is 0 (the row is skipped) or lies in {low:g}..{high:g}; correct the row"
        self._check(self.models[0].name, self.layout.weight, weights, good, rows, rule)
        return weights

    def _scores(self, model: PredictionModel, table: pa.Table, rows: Rows) -> np.ndarray:
        scores, kind = self._numbers(model.name, table, model.score, rows), self.score_type(model)
        kinds = self._score_kinds(model)
        if all(map(pa.types.is_decimal, kinds)):
            return self._scaled(model, table[model.score], max(decimal.scale for decimal in kinds))
        if kind == np.int64:
            # Unsigned numbers beyond int64: flipping the first bit keeps their order.
            return scores.view(np.int64) ^ np.int64(-(1 << 63)) if scores.dtype == np.uint64 else scores.astype(kind)
        # As float64, whole numbers above MOST_EXACT become equal to their neighbors, and lose their order. In CSV
        # files, whose column was read as float64, numbers beyond 64-bit integers are floats, so they are accepted.
        is_text = any(file.suffix != ".parquet" for file in self.files[model.name])
        if scores.dtype.kind in "iu" or is_text:
            size = np.abs(scores.astype(np.float64))
            exact = (size <= MOST_EXACT) | ((size > 2 * float(1 << 63)) & is_text)
            rule = "with fractions, whole numbers from 2^53 on are not exact: write only whole numbers, or ranks"
            self._check(model.name, model.score, scores, exact, rows, rule)
        return scores.astype(kind, copy=False)

    def _scaled(self, model: PredictionModel, scores: pa.ChunkedArray, scale: int) -> np.ndarray:
        """Decimals, which SQL engines write, times 10^scale as int64: float64 would make some of them equal."""
        place = f"column {model.score!r} of {self.files[model.name][0]}"
        with error_location(place, "write it as float64, because decimals of more than 18 digits cannot be compared"):
            halves = pc.cast(scores, pa.decimal128(38, scale)).combine_chunks()
            low, high = np.frombuffer(halves.buffers()[1], np.int64).reshape(-1, 2)[halves.offset :][: len(halves)].T
            if (high != low >> 63).any():
                raise ValueError(f"a score times 10^{scale} is beyond 64 bits")
        return low

    def _all_probabilities(self, tables: Mapping[str, pa.Table], rows: Rows) -> dict[str, np.ndarray]:
        having = [model for model in self.models if model.probability]
        return {model.name: self._probabilities(model, tables[model.name], rows) for model in having}

    def _probabilities(self, model: PredictionModel, table: pa.Table, rows: Rows) -> np.ndarray:
        assert model.probability
        values = self._numbers(model.name, table, model.probability, rows).astype(np.float64)
        rule = "a probability lies in 0..1; pass a logit through the sigmoid, or leave --probability out"
        self._check(model.name, model.probability, values, (values >= 0) & (values <= 1), rows, rule)
        return values

    def _numbers(self, name: str, table: pa.Table, column: str, rows: Rows) -> np.ndarray:
        """A numeric column in its own type; raises ValueError for nulls and NaN."""
        array = self._values(name, table, column)
        if array.dtype.kind == "f":
            rule = "it must be a number (infinities are allowed in scores); remove the row, or correct the model"
            self._check(name, column, array, ~np.isnan(array), rows, rule)
        return array

    def _values(self, name: str, table: pa.Table, column: str) -> np.ndarray:
        """A numeric column in its own type, with NaN for nulls."""
        values = table[column]
        if pa.types.is_decimal(values.type):
            values = pc.cast(values, pa.float64())
        kind = values.type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
            raise ValueError(f"{self.readers[name].files[0]}: column {column!r} is {kind}; it must hold numbers")
        array = np.asarray(values.to_numpy())  # nulls become NaN
        return array if array.dtype.kind in "fiu" else array.astype(np.float64)

    def _check(self, name: str, column: str, values: np.ndarray, good: np.ndarray, rows: Rows, rule: str) -> None:
        if not good.all():
            row = int((~good).argmax())
            place = self.readers[name].locate(int(rows[name][row]))
            raise ValueError(f"{place}: column {column!r} is {float(values[row]):g}; {rule}")

    def _check_seconds(self, column: str, seconds: np.ndarray, rows: Rows) -> None:
        # float16 would round the limit to infinity.
        seconds = seconds.astype(np.float64) if seconds.dtype.kind == "f" else seconds
        good = (seconds >= 0) & (seconds <= MAX_SECOND)
        if not good.all():
            wrong = float(seconds[(~good).argmax()])
            problem = describe_time(f"{wrong:g}", int(wrong) if np.isfinite(wrong) else None)
            rule = f"{problem}; give seconds, or leave it out (--timestamp NONE)"
            self._check(self.models[0].name, column, seconds, good, rows, rule)

    def _slices(self, table: pa.Table, rows: Rows, items: np.ndarray | None) -> list[Slices]:
        layout, found = self.layout, []
        cold: np.ndarray | None = None
        if layout.item_is_cold:
            with error_location(
                f"column {layout.item_is_cold!r} of {self.files[self.models[0].name][0]}", "write true or false"
            ):
                flags = pc.utf8_lower(pc.cast(table[layout.item_is_cold], pa.string()))
            cold, known = (pc.is_in(flags, value_set=pa.array(words)).to_numpy() for words in (_TRUE, _TRUE + _FALSE))
            self._check(
                self.models[0].name,
                layout.item_is_cold,
                np.where(known, 0, np.nan),
                known,
                rows,
                "write true or false",
            )
        elif items is not None and self._known_items is not None:
            cold = ~np.isin(items, self._known_items)
        if cold is not None:
            found.append(cold_slices(cold))
        if layout.history_length:
            lengths = self._numbers(self.models[0].name, table, layout.history_length, rows)
            found.append(history_slices(lengths))
        if layout.item and self._item_events is not None:
            found.append(item_slices(self._item_events[table[layout.item].to_numpy()]))
        if layout.timestamp:
            if not pa.types.is_timestamp(table[layout.timestamp].type) or table[layout.timestamp].null_count:
                seconds = self._numbers(self.models[0].name, table, layout.timestamp, rows)
                self._check_seconds(layout.timestamp, seconds, rows)
            found += time_slices(seconds_of(table[layout.timestamp]))
        for column in layout.slices:
            place = f"column {column!r} of {self.files[self.models[0].name][0]}"
            with error_location(place, "its values must be numbers or text"):
                values, codes = encoded(table[column])
            found.append(([f"{column}={value}" for value in values], codes))
        return found


def row_keys(
    is_positive: np.ndarray, weights: np.ndarray | None, users: np.ndarray | None, items: np.ndarray | None
) -> np.ndarray:
    """Hash of each row's label and of its weight, user and item, except those that are None: uint64 [n]."""
    columns = (None if weights is None else weights.view(np.int64), users, items)
    there = [column for column in columns if column is not None]
    if not there:
        return hash_columns(np.arange(2))[is_positive.astype(np.int8)]
    return hash_columns(is_positive.astype(np.int64), *there)


def known_items(files: Sequence[str | Path], column: str, folder: Path) -> np.ndarray:
    """The distinct items of training files as `identities`, int64, ascending.

    Raises:
        ValueError: a file is missing or does not have the column.
    """
    reader, found = RowReader(find_files(files), [column], folder), np.empty(0, np.int64)
    for table in reader.batches(0, reader.rows, 1 << 20):
        found = np.union1d(found, identities(table[column]))
    return found


def _unzipped(read: Tables) -> tuple[dict[str, pa.Table], Rows]:
    """(Model → its rows, model → their numbers)."""
    return {name: table for name, (table, _) in read.items()}, {name: rows for name, (_, rows) in read.items()}
