"""`seal`: checks the files of a dataset that another program wrote (Spark, Ray, SQL), and writes the manifest.

The folder has the files of a base that `data.dataset` lists, except `manifest.json`, `training_item_counts.npy` and
`events/`, which `seal` writes. A file `contract.yaml` has the facts that cannot be derived from the files:

    name: shop
    label_rule: stars >= 4
    actions: [click, buy]             # names of the actions 1, 2, ...
    text_columns: [title, brand]      # of items.parquet, in this order
    has_timestamps: true              # false: the seconds only give the order
    split: {rule: time, cut_timestamps: [1700000000, 1700100000]}    # first second of valid and of test
    # or {rule: leave_one_out}, or {rule: leave_last, fractions: [0.8, 0.1, 0.1]}
    events:                           # optional: declared columns, as a table mapping names them (docs/tasks.md)
      labels: {click: binary, like: {kind: binary, given: click}}
      weight: true
      context: {device: categorical, price: numeric}

With declared columns, sequences also have the list columns of `data.event_schema`: label_like, weight, context_device,
...; categorical context is stored as ids of features/<name>.parquet.

`seal` checks every rule that readers rely on: ids have no gaps, raw ids are distinct, the values of the sequences are
allowed, each user has at most one row in a part, the history of a row equals the user's events in the earlier parts,
and the parts follow the split's rule.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.atomic_files import replace_file
from hllm_torchrec.common.hashing import hash_columns
from hllm_torchrec.common.yaml_files import abbreviate, read_yaml
from hllm_torchrec.data.base_events import write_base_events
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.event_schema import SAMPLING_RATE, WEIGHT
from hllm_torchrec.data.events import Sequences, sequence_schema
from hllm_torchrec.data.manifest import ITEM_COUNTS, MANIFEST, SCHEMA_VERSION, file_facts, fingerprint_of
from hllm_torchrec.data.sources.declared_columns import read_declarations
from hllm_torchrec.data.sources.table_columns import EventColumns
from hllm_torchrec.data.split import SPLITS, per_user_starts
from hllm_torchrec.data.validation import REMEDY, error_location
from hllm_torchrec.data.vocabulary import compute_marks

logger = logging.getLogger(__name__)
CONTRACT, EVENTS = "contract.yaml", "events"
_FIELDS: dict[str, type] = {
    "name": str,
    "label_rule": str,
    "actions": list,
    "text_columns": list,
    "has_timestamps": bool,
    "split": dict,
}
_REMEDY = "write the file again, then seal"


def seal(root: Path) -> Dataset:
    """Check the files of the dataset in `root`, then write event files, item counts and the manifest.

    Raises:
        ValueError: a file or the contract breaks a rule (the message names file, row and remedy), or the folder already
            has a manifest.
    """
    if (root / MANIFEST).exists():
        raise ValueError(f"{root} has a {MANIFEST} already; remove it to seal the folder again")
    contract = read_contract(root / CONTRACT)
    manifest = _described(root, contract)
    if EVENTS in contract:
        manifest |= _declared(root, contract[EVENTS])
    dataset = Dataset(root, manifest)
    with _remedy_of_sealing():
        _check_tables(dataset)
        facts = _check_sequences(dataset)
    np.save(root / ITEM_COUNTS, facts.pop("item_counts"))
    found = write_base_events(dataset, root)
    listed = file_facts(root, [root / name for name in (ITEM_COUNTS, *found["event_files"])])
    manifest |= facts
    manifest["seconds"] = found["seconds"]
    manifest["vocabulary"] = {name: mark.to_json() for name, mark in compute_marks(dataset).items()}
    manifest["files"] |= {ITEM_COUNTS: listed.pop(ITEM_COUNTS)}
    manifest["event_files"] = listed
    manifest["fingerprint"] = fingerprint_of(dict(sorted(manifest["files"].items())))
    replace_file(root / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    logger.info("%s: sealed", root)
    return Dataset.open(root)


@contextmanager
def _remedy_of_sealing() -> Iterator[None]:
    """Context manager that replaces the remedies of `data.validation`, since `hllm prepare` did not write the files."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(f"; {REMEDY}", f"; {_REMEDY}")) from error


def read_contract(path: Path) -> dict[str, Any]:
    """Read `contract.yaml`. Raises ValueError that names the wrong field."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: it has the facts that the files do not contain; see `hllm seal --help`")
    raw = read_yaml(path)
    if not isinstance(raw, Mapping):
        raise ValueError(f"{path} must be a mapping of names, not {abbreviate(raw)}")
    for name, kind in _FIELDS.items():
        if not isinstance(raw.get(name), kind):
            raise ValueError(f"{path}: {name} is {abbreviate(raw.get(name))}, it must be {_KINDS[kind]}")
    unknown = sorted(set(raw) - {*_FIELDS, EVENTS})
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]}; known: {', '.join((*_FIELDS, EVENTS))}")
    split = dict(raw["split"])
    cuts: Any = split.get("cut_timestamps")
    fractions: Any = split.get("fractions")
    if split.get("rule") not in ("time", "leave_one_out", "leave_last"):
        rule = abbreviate(split.get("rule"))
        raise ValueError(f"{path}: split.rule is {rule}; choose time, leave_one_out or leave_last")
    if split["rule"] == "time" and not (_numbers(cuts, 2, int) and sorted(cuts) == cuts):
        raise ValueError(f"{path}: split.cut_timestamps must be the first second of valid and the first second of test")
    if split["rule"] == "leave_last" and not _numbers(fractions, 3, int | float):
        raise ValueError(f"{path}: split.fractions must be three shares (train, valid, test)")
    return dict(raw)


_KINDS = {str: "text", list: "a list of names", bool: "true or false", dict: "a mapping"}


def _numbers(value: Any, count: int, kind: Any) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(one, kind) for one in value)


def _described(root: Path, contract: dict[str, Any]) -> dict[str, Any]:
    """The part of the manifest that is derived from the contract and from the files' names and sizes."""
    names = ["items.parquet", "users.parquet"]
    names += sorted(f"features/{path.name}" for path in (root / "features").glob("*.parquet"))
    for part in SPLITS:
        found = sorted(f"sequences/{part}/{path.name}" for path in (root / "sequences" / part).glob("part-*.parquet"))
        if not found:
            raise ValueError(f"{root / 'sequences' / part} has no file part-*.parquet; write the {part} part there")
        names += found
    for name in names:
        if not (root / name).is_file() or (root / name).is_symlink():
            raise ValueError(f"{root / name} is missing or a link; {_REMEDY}")
    files = file_facts(root, [root / name for name in names])
    sizes: dict[str, int] = {}
    features: dict[str, dict[str, Any]] = {}
    for kind in ("items", "users"):
        with error_location(root / f"{kind}.parquet", _REMEDY):
            table = pq.ParquetFile(root / f"{kind}.parquet")
        sizes[kind] = table.metadata.num_rows
        columns = [name for name in table.schema_arrow.names if name.startswith("feature_")]
        features[kind] = {name.removeprefix("feature_"): {} for name in columns}
        for name in features[kind]:
            path = root / "features" / f"{name}.parquet"
            with error_location(path, _REMEDY):
                features[kind][name] = {"size": pq.ParquetFile(path).metadata.num_rows + 1}
    split = contract["split"]
    times = split.get("cut_timestamps", []) if split["rule"] == "time" else []
    return {
        "schema_version": SCHEMA_VERSION,
        "name": contract["name"],
        "counts": {**sizes, "events": 0, "dropped": {}, "kept": {}},
        "parts": {},
        "split": {**split, "cut_timestamps": times, "cut_orders": [0] * len(times)},
        "label_rule": contract["label_rule"],
        "has_timestamps": contract["has_timestamps"],
        "actions": {
            "number": len(contract["actions"]) + 1,
            "names": {str(number): str(name) for number, name in enumerate(contract["actions"], start=1)},
        },
        "text_columns": [str(name) for name in contract["text_columns"]],
        "item_features": features["items"],
        "user_features": features["users"],
        "source": {"name": contract["name"], "files": [CONTRACT], "license": ""},
        "request": {"source_fingerprint": fingerprint_of(files), "min_events": 0, "users_per_row_group": 256},
        "files": files,
    }


def _declared(root: Path, raw: Any) -> dict[str, Any]:
    """The manifest's entries for declared columns of events."""
    path, kinds = root / CONTRACT, {"labels": dict, WEIGHT: bool, SAMPLING_RATE: bool, "context": dict}
    if not isinstance(raw, Mapping):
        raise ValueError(f"{path}: {EVENTS} is {abbreviate(raw)}, it must be a mapping of names")
    for name, value in raw.items():
        if name not in kinds:
            raise ValueError(f"{path}: unknown key {EVENTS}.{str(name)[:100]}; known: {', '.join(kinds)}")
        if not isinstance(value, kinds[name]):
            raise ValueError(f"{path}: {EVENTS}.{name} is {abbreviate(value)}, it must be {_KINDS[kinds[name]]}")
    given = EventColumns(
        CONTRACT,
        "",
        "",
        labels=raw.get("labels", {}),
        context=raw.get("context", {}),
        weight=WEIGHT if raw.get(WEIGHT) else None,
        sampling_rate=SAMPLING_RATE if raw.get(SAMPLING_RATE) else None,
    )
    declared = read_declarations(given, path)
    entries = [*raw.get("labels", {}).items(), *raw.get("context", {}).items()]
    mapped = {name: one["column"] for name, one in entries if isinstance(one, Mapping) and "column" in one}
    if declared.positive_from or any(column != name for name, column in mapped.items()):
        raise ValueError(f"{path}: {EVENTS}: sequences have the stored values; leave column and positive_from out")
    sizes = {}
    for name in declared.schema.categorical:
        file = root / "features" / f"{name}.parquet"
        with error_location(file, _REMEDY):
            sizes[name] = {"size": pq.ParquetFile(file).metadata.num_rows + 1}
    return {"event_schema": declared.schema.to_json()} | ({"context_features": sizes} if sizes else {})


def _check_tables(dataset: Dataset) -> None:
    """Check items, users and values of features."""
    for kind, table in (("item", dataset.items), ("user", dataset.users)):
        path = dataset.root / f"{kind}s.parquet"
        raw = table[f"raw_{kind}_id"] if f"raw_{kind}_id" in table.column_names else None
        if raw is None or not pa.types.is_string(raw.type):
            raise ValueError(f"{path}: raw_{kind}_id must be a column of strings; {_REMEDY}")
        _check_distinct(path, f"raw_{kind}_id", raw)
        for name in dataset.manifest[f"{kind}_features"]:
            dataset.feature_ids(kind, name)  # ids within the feature's values, no null
            _check_distinct(dataset.root / "features" / f"{name}.parquet", "value", dataset.feature_values(name))
    for name in dataset.schema.categorical:
        _check_distinct(dataset.root / "features" / f"{name}.parquet", "value", dataset.feature_values(name))
    texts = dataset.text(dataset.manifest["text_columns"]) if dataset.manifest["text_columns"] else dataset.items
    for name in dataset.manifest["text_columns"]:
        if not pa.types.is_string(texts[name].type) or texts[name].null_count:
            raise ValueError(f'{dataset.root / "items.parquet"}: {name} must be strings, "" without text; {_REMEDY}')


def _check_distinct(path: Path, name: str, values: pa.ChunkedArray) -> None:
    blank = pc.equal(pc.utf8_trim_whitespace(pc.fill_null(values, "")), "").to_numpy(zero_copy_only=False)
    if blank.any():
        raise ValueError(f"{path}, row {int(blank.argmax())}: {name} is empty; {_REMEDY}")
    if len(pc.unique(values)) != len(values):
        counts = values.value_counts()
        twice = counts.field("values")[int(np.argmax(counts.field("counts").to_numpy() > 1))]
        raise ValueError(f"{path}: {name} {abbreviate(twice.as_py())} is there more than once; {_REMEDY}")


def _check_sequences(dataset: Dataset) -> dict[str, Any]:
    """Check all sequences; returns the manifest's `counts` and `parts`, and the events of each item in train."""
    # For each user, after the parts read so far: number of events, and a hash of these events in order.
    lengths, hashes = np.zeros(dataset.num_users, np.int64), np.zeros(dataset.num_users, np.uint64)
    starts = np.zeros((dataset.num_users, len(SPLITS)), np.int64)
    item_counts, parts = np.zeros(dataset.num_items, np.int64), {}
    for p, part in enumerate(SPLITS):
        seen = np.zeros(dataset.num_users, bool)
        starts[:, p] = lengths
        facts = {"users": 0, "events": 0, "exposures": 0, "positives": 0}
        for group in dataset.row_groups(part):
            rows = dataset.sequences([group], sequence_schema(dataset.schema.columns).names)
            place = f"{group.path}, row group {group.index}"  # type: ignore[union-attr]
            _check_group(place, rows, part, seen, lengths, hashes, dataset.manifest["split"])
            own = rows.own_events
            labels = rows.labels[own]
            facts["users"] += rows.user_ids.size
            facts["events"] += own.size
            facts["exposures"] += int(np.count_nonzero(~np.isnan(labels)))
            facts["positives"] += int(np.count_nonzero(labels > 0.5))
            if p == 0:
                item_counts += np.bincount(rows.item_ids, minlength=dataset.num_items)
        parts[part] = facts
    _check_rule(dataset, starts, lengths)
    counts = {n: sum(facts[n] for facts in parts.values()) for n in ("events", "exposures", "positives")}
    return {"counts": {**dataset.manifest["counts"], **counts}, "parts": parts, "item_counts": item_counts}


def _check_group(
    place: str,
    rows: Sequences,
    part: str,
    seen: NDArray[np.bool_],
    lengths: Ints,
    hashes: NDArray[np.uint64],
    split: dict[str, Any],
) -> None:
    """Check the rows of a row group against the earlier parts; updates `seen`, `lengths` and `hashes`."""
    users = rows.user_ids

    def refuse(bad: np.ndarray, rule: str) -> None:
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(f"{place}, row {row}: user {users[row]} {rule}; {_REMEDY}")

    refuse(users < 1, "is not a user: ids are from 1 on")
    first = np.unique(users, return_index=True)[1]
    refuse(seen[users] | ~np.isin(np.arange(users.size), first), "has an earlier row in this part")
    refuse(rows.target_start != lengths[users], f"has a target_start that is not its number of events before {part}")
    refuse(rows.lengths <= rows.target_start, f"has no event in {part}")
    row = np.repeat(np.arange(users.size), rows.lengths)
    position = np.arange(row.size) - rows.offsets[row]
    labels = np.where(np.isnan(rows.labels), 2, rows.labels).astype(np.int64)
    events = hash_columns(rows.item_ids, rows.timestamps, labels, rows.actions, position, *_bits(rows))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(events, dtype=np.uint64)])
    before = sums[rows.offsets[:-1] + rows.target_start] - sums[rows.offsets[:-1]]
    refuse(before != hashes[users], f"has a history in {part} that differs from its events in the earlier parts")
    if split["rule"] == "time":
        second, own = split["cut_timestamps"], rows.own_events
        low, high = {"train": (0, second[0]), "valid": second, "test": (second[1], 2**62)}[part]
        outside = np.zeros(users.size, bool)
        times = rows.timestamps[own]
        outside[row[own][(times < low) | (times > high)]] = True
        refuse(outside, f"has an event in {part} outside of the seconds that cut_timestamps give this part")
    seen[users], lengths[users], hashes[users] = True, rows.lengths, sums[rows.offsets[1:]] - sums[rows.offsets[:-1]]


def _bits(rows: Sequences) -> list[Ints]:
    """The declared columns [T] as integers that are equal for equal values; all NaN are equal."""
    known = (np.where(values != values, np.float32(np.nan), values) for values in rows.extra.values())
    return [(column.view(np.int32) if column.dtype == np.float32 else column).astype(np.int64) for column in known]


def _check_rule(dataset: Dataset, starts: Ints, lengths: Ints) -> None:
    """Raise ValueError if a user's parts do not follow a per-user rule of the split."""
    split = dataset.manifest["split"]
    if split["rule"] == "time":
        return
    due = np.stack(per_user_starts(split["rule"], split.get("fractions"), lengths), axis=1)
    wrong = (starts[:, 1:] != due).any(axis=1)
    if wrong.any():
        user = int(wrong.argmax())
        raise ValueError(
            f"{dataset.root}: user {user} has {lengths[user]} events, of which valid begins at {starts[user, 1]} and "
            f"test at {starts[user, 2]}; {split['rule']} divides at {due[user, 0]} and {due[user, 1]}; {_REMEDY}"
        )
