"""`append_events`: adds a version to a dataset from a source that holds only the new data.

A version is a folder with the new events by user, new and changed rows of items and users, and new values of features;
existing files do not change. The cost is proportional to the size of the source, except for a scan over the known raw
ids, for reading the histories of users with late events, and for the occasional folding of earlier appends into larger
ones or into a new base (`data.folding`).
"""

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.seconds import text_of
from hllm_torchrec.data.bad_rows import BadRows
from hllm_torchrec.data.base_events import write_base_events
from hllm_torchrec.data.changed_rows import changed_items, changed_users
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.dataset_compaction import write_base
from hllm_torchrec.data.event_files import write_event_file
from hllm_torchrec.data.events import Events
from hllm_torchrec.data.feature_spellings import check_spellings
from hllm_torchrec.data.folding import Append, appends_to_fold, fold_appends, is_outgrown
from hllm_torchrec.data.manifest import EVENTS, chain_base, files_of_chain
from hllm_torchrec.data.sources.base import Source
from hllm_torchrec.data.split import Split, cut_facts, date_cuts
from hllm_torchrec.data.staging import Staged, default_partitions, stage
from hllm_torchrec.data.validation import TableRows
from hllm_torchrec.data.versions import (
    APPENDS,
    BASES,
    commit_version,
    draft_folder,
    folder_facts,
    version_name,
    write_lock,
)
from hllm_torchrec.data.vocabulary import dataset_marks, mark_ids

logger = logging.getLogger(__name__)
_NAMED_FILES = 10
"""Maximum number of a source's files that the manifest names."""
_ODDS_RATIO, _LEAST_ODDS = 4, 0.005
"""A share p of positives is reported if its odds (p + _LEAST_ODDS) / (1 - p + _LEAST_ODDS) changed by the factor
_ODDS_RATIO or more."""


def append_events(
    source: Source,
    root: Path,
    *,
    policy: BadRows | None = None,
    split: Split | None = None,
) -> dict[str, Any] | None:
    """Add the source's events, items and users to the dataset in `root` as a new version; all ids are kept.

    Events of earlier versions (same user, second and item) are left out and counted. Rows of known items and users are
    added only if a column differs, and then replace the earlier ones. If the result is None or an error is raised, no
    data were added; but a version with the same data in other files may have been written (`_with_event_files`,
    `write_base`).

    Args:
        policy: handling of bad rows; None: the source's default.
        split: a split by date, which the new version applies to all events; None: the split of the version before.

    Returns:
        The number of the version and the counts of the added rows (`added` in its manifest). None if the source holds
        nothing new and `split` does not change the dates.

    Raises:
        ValueError: a row is bad; the source has other columns, features or labels than the dataset; the dataset does
            not support appends (see `_check_fits`); or `split` is not by date, leaves a part without events, or is
            given for a dataset that is not split by time or date.
    """
    with write_lock(root):
        dataset = Dataset.open(root)
        fingerprint = source.fingerprint()
        known = next((one for one in dataset_sources(dataset) if one["fingerprint"] == fingerprint), None)
        _check_split(split, dataset)
        moves = split is not None and cut_facts(split, date_cuts(split)) != dataset.manifest["split"]
        if known is not None and not moves:
            logger.info("%s: version %d was made from the same files: nothing to append", root, known["version"])
            return None
        _check_fits(source, dataset)
        dataset = _with_event_files(dataset)
        if is_outgrown(dataset.manifest):
            write_base(dataset)
            dataset = Dataset.open(root)
        version = dataset.version + 1
        added, changes = _write_version(dataset, source, policy, version)
        sources = dataset_sources(dataset)
        if "appends" in changes:
            sources.append({"version": version, "fingerprint": fingerprint})
        elif moves:
            logger.info("%s: the source holds nothing new: version %d has other dates only", root, version)
            kept = {"appends": dataset.manifest.get("appends", []), "files": files_of_chain(dataset.manifest)}
            changes = {"notes": changes["notes"], **kept}
        else:
            found = ", ".join(f"{reason} {count:,}" for reason, count in added["dropped"].items())
            logger.info("%s: the source holds nothing new%s: no version is written", root, found and f" ({found})")
            return None
        commit_version(root, version, _manifest(dataset, added, changes, sources, split))
    logger.info("%s: version %d: %d events of %d users", root, version, added["events"], added["users"])
    return {"version": version, **added}


def dataset_sources(dataset: Dataset) -> list[dict[str, Any]]:
    """Version and fingerprint of each source that the dataset was made from."""
    first = {"version": 1, "fingerprint": dataset.manifest["request"]["source_fingerprint"]}
    return list(dataset.manifest.get("sources", [first]))


def _check_fits(source: Source, dataset: Dataset) -> None:
    """Raise ValueError if the source's events cannot be added to the dataset."""
    manifest, where = dataset.manifest, f"{dataset.root}: --append"
    names = {int(number): name for number, name in manifest["actions"]["names"].items()}
    same = {
        "text columns": (list(source.text_columns), manifest["text_columns"]),
        "item features": (sorted(source.item_features), sorted(manifest["item_features"])),
        "user features": (sorted(source.user_features), sorted(manifest["user_features"])),
        "label rule": (source.label_rule, manifest["label_rule"]),
        **{
            f"settings of {name}": (source.schema.described.get(name), dataset.schema.described.get(name))
            for name in {**source.schema.described, **dataset.schema.described}
        },
        "actions": ({k: v for k, v in source.action_names.items() if k in names}, names),
    }
    for what, (new, old) in same.items():
        if new != old:
            raise ValueError(
                f"{where}: the {what} of the source are {new or 'none'}, those of the dataset {old or 'none'}; give "
                "the source with which it was prepared, or prepare all data again (--extend)"
            )
    if not (source.has_timestamps and manifest["has_timestamps"]):
        raise ValueError(f"{where}: events without timestamps have no order across files; prepare all again (--extend)")
    if manifest["request"]["min_events"] > 1:
        raise ValueError(
            f"{where}: a k-core needs all events; prepare them all again (--extend), or without --min-events"
        )
    if "hold_out_items" in manifest["split"]:
        raise ValueError(f"{where}: held-out items measure cold start on fixed events; prepare all again (--extend)")


def _check_split(split: Split | None, dataset: Dataset) -> None:
    """Raise ValueError if `split` is not by date, or the dataset's split is neither by time nor by date."""
    rule = dataset.manifest["split"]["rule"]
    if split is not None and (split.rule != "date" or rule not in ("time", "date")):
        raise ValueError(
            f"{dataset.root}: --append with split {split.rule}: the dataset is split by {rule}; only dates can move, "
            "and only in a dataset split by time or date; leave the split out"
        )


def _with_event_files(dataset: Dataset) -> Dataset:
    """Return the dataset; if it has no event files (earlier release), write a new version with them and return that."""
    if chain_base(dataset.manifest) is not None:
        return dataset
    root, version = dataset.root, dataset.version + 1
    logger.info("%s: converting the events once to event files, which appends can be merged with", root)
    with draft_folder(root, BASES, version) as folder:
        found = write_base_events(dataset, folder)
        name = f"{BASES}/{version_name(version)}"
        files = {**files_of_chain(dataset.manifest), **folder_facts(folder, name)}
    split = dataset.manifest["split"]
    base = {
        "folder": "",
        "event_files": [f"{name}/{one}" for one in found["event_files"]],
        "cuts": [split.get("cut_timestamps", []), split.get("cut_orders", [])],
        "seconds": found["seconds"],
    }
    manifest = {**dataset.manifest, "base": base, "appends": [], "files": files, "seconds": found["seconds"]}
    commit_version(root, version, manifest)
    return Dataset.open(root)


def _fold(
    dataset: Dataset, version: int, added: dict[str, Any], changes: dict[str, Any], own: Path, folder: Path
) -> dict[str, Any]:
    """Move the version's files from `own` to `folder`; merge them with earlier appends that are due for folding.

    Returns `appends` and `files` of the manifest.
    """
    old, name = dataset.manifest.get("appends", []), f"{APPENDS}/{version_name(version)}"
    # Only the newest appends are folded, so the order of the versions is kept.
    number, level = appends_to_fold(old, added["events"])
    kept, folded = old[: len(old) - number], old[len(old) - number :]
    event_files, rows = changes.pop("event_files"), changes.pop("rows")
    if folded:
        parts = [
            Append(
                dataset.root / one["folder"], [file.removeprefix(f"{one['folder']}/") for file in one["event_files"]]
            )
            for one in folded
        ]
        event_files = fold_appends([*parts, Append(own, event_files)], folder, rows)
    else:  # nothing to fold: rename the folder of the version's files
        folder.rmdir()
        own.rename(folder)
    seconds = [second for one in (*folded, added) for second in one["seconds"] or ()]
    entry = {
        "version": version,
        "level": level,
        "folder": name,
        "event_files": [f"{name}/{one}" for one in event_files],
        "events": added["events"] + sum(one["events"] for one in folded),
        "seconds": [min(seconds), max(seconds)] if seconds else None,
    }
    # The new manifest lists only the folded files; the old folders remain until `prune`, for the versions that name
    # them.
    gone = tuple(f"{one['folder']}/" for one in folded)
    files = {file: facts for file, facts in files_of_chain(dataset.manifest).items() if not file.startswith(gone)}
    return {"appends": [*kept, entry], "files": {**files, **folder_facts(folder, name)}}


def _write_version(
    dataset: Dataset, source: Source, policy: BadRows | None, version: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the version's files, if anything is new; returns the result of `_write`, joined with that of `_fold`."""
    with draft_folder(dataset.root, APPENDS, version) as folder:
        count, scratch = default_partitions(source), folder.parent / "scratch"
        staged = stage(
            source, policy or source.policy, count, scratch, dataset, with_rows=False, forgotten=dataset.tombstones
        )
        own = folder.parent / "own"
        own.mkdir()
        added, changes = _write(dataset, source, staged, own)
        if any(own.iterdir()):
            changes |= _fold(dataset, version, added, changes, own, folder)
    return added, changes


def _write(dataset: Dataset, source: Source, staged: Staged, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the version's files; returns (counts of what it adds, new values of the manifest's fields).

    Nothing is written if nothing is new.
    """
    user_counts, item_counts = staged.partitions.counts(len(staged.users), len(staged.catalogue))
    staged.users.assign_ids(user_counts)
    item_ids = staged.catalogue.final_ids(item_counts > 0, source.keep_items_without_events)
    added = _write_events(dataset, staged, item_ids, folder)
    items = changed_items(dataset, staged.catalogue, item_ids, staged.item_words)
    users = changed_users(dataset, staged.users, staged.user_files, staged.user_words)
    for name, rows in (("items", items), ("users", users)):
        if len(rows):
            folder.mkdir(exist_ok=True)
            pq.write_table(rows, folder / f"{name}.parquet", compression="zstd")
    # Marks are hash chains: hashing continues from the mark of the version before, so that version's ids are not read.
    marks = dataset_marks(dataset)
    every = {"item_features": staged.item_words, "user_features": staged.user_words}
    every |= {"context_features": staged.context_words} if staged.context_words else {}
    notes = [note for words in every.values() for note in check_spellings(words, staged.log)]
    changes: dict[str, Any] = {kind: {} for kind in every}
    for kind, words in every.items():
        for name, vocabulary in words.items():
            # Ids of values are dense from 1 (0: unknown), so the rows from `known` on are the new values.
            known = int(dataset.manifest[kind][name]["size"]) - 1
            new = vocabulary.table().slice(known)
            changes[kind][name] = {"size": vocabulary.size}
            marks[f"feature/{name}"] = mark_ids(new["value"].to_pylist(), marks[f"feature/{name}"])
            if len(new):
                (folder / "features").mkdir(exist_ok=True)
                pq.write_table(new, folder / "features" / f"{name}.parquet")
    new_items = items.filter(pa.array(items["item_id"].to_numpy() >= dataset.num_items))
    new_users = users.filter(pa.array(users["user_id"].to_numpy() >= dataset.num_users))
    marks["items"] = mark_ids(new_items["raw_item_id"].to_pylist(), marks["items"])
    marks["users"] = mark_ids(new_users["raw_user_id"].to_pylist(), marks["users"])
    added |= {
        "new_items": len(new_items),
        "changed_items": len(items) - len(new_items),
        "new_users": len(new_users),
        "new_users_without_features": _number_without_features(new_users),
        "changed_users": len(users) - len(new_users),
        "dropped": dict(sorted(staged.log.dropped.items())),
        "kept": dict(sorted(staged.log.kept.items())),
        "source_files": [path.name for path in source.event_files[:_NAMED_FILES]],
    }
    names = dataset.manifest["actions"]["names"] | {str(k): v for k, v in source.action_names.items()}
    changes["actions"] = {"number": max(map(int, names), default=0) + 1, "names": names}
    new_actions = sorted(int(number) for number in names if int(number) >= dataset.num_actions)
    marks["actions"] = mark_ids([names[str(number)] for number in new_actions], marks["actions"])
    changes["vocabulary"] = {name: mark.to_json() for name, mark in marks.items()}
    changes["event_files"] = added.pop("event_files")
    changes["notes"] = [*staged.log.notes(), *notes, *_positives_note(dataset.manifest["counts"], added)]
    changes["rows"] = TableRows(
        dataset.num_items + len(new_items),
        dataset.num_users + len(new_users),
        changes["actions"]["number"],
        dataset.schema,
    )
    return added, changes


def _number_without_features(users: pa.Table) -> int:
    """Number of users for whom every feature is empty; 0 if the dataset has no user features."""
    lengths = [
        pc.list_value_length(users[name]).to_numpy() for name in users.column_names if name.startswith("feature_")
    ]
    return int((np.stack(lengths).max(axis=0) == 0).sum()) if lengths and len(users) else 0


def _write_events(dataset: Dataset, staged: Staged, item_ids: Ints, folder: Path) -> dict[str, Any]:
    """Write event files of the events that no earlier version has; returns the files' names and the counts."""
    last = dataset.manifest["seconds"][1]
    names: list[str] = []
    found = {"events": 0, "late_events": 0, "exposures": 0, "positives": 0, "users": 0}
    seconds: list[int] = []
    for table in staged.partitions:
        user_ids = staged.users.final_ids[table["user"].to_numpy()]
        columns = {c.name: table[c.single].to_numpy() for c in dataset.schema.columns}
        events = Events.of_columns(columns | {"item_ids": item_ids[columns["item_ids"]]})
        known = _known_events(dataset, user_ids, events, last)
        if known.any():
            _report_known(staged, table, known)
            user_ids, events = user_ids[~known], events[~known]
        if not len(events):
            continue
        names.append(f"{EVENTS}/part-{len(names):05d}.arrow")
        starts = np.flatnonzero(np.diff(user_ids, prepend=-1))
        write_event_file(folder / names[-1], user_ids[starts], np.diff(starts, append=user_ids.size), events)
        labelled = ~np.isnan(events.labels)
        found["events"] += len(events)
        found["late_events"] += int((events.timestamps <= last).sum())
        found["exposures"] += int(labelled.sum())
        found["positives"] += int((events.labels > 0.5).sum())
        found["users"] += starts.size
        seconds += [int(events.timestamps.min()), int(events.timestamps.max())]
    return {**found, "event_files": names, "seconds": [min(seconds), max(seconds)] if seconds else None}


def _known_events(dataset: Dataset, user_ids: Ints, events: Events, last: int) -> np.ndarray:
    """Mask (bool [n]) of the events that an earlier version has: same user, second and item.

    Only events up to the dataset's last second can be known, so only histories of users with such an event are read.
    """
    late = np.flatnonzero((events.timestamps <= last) & (user_ids < dataset.num_users))
    found = np.zeros(len(events), bool)
    if not late.size:
        return found
    users = np.unique(user_ids[late])
    old, lengths = dataset.merged.events_of(users)
    before = _keys(np.repeat(users, lengths), old)
    found[late] = np.isin(_keys(user_ids[late], events[late]), before)
    return found


def _keys(user_ids: Ints, events: Events) -> np.ndarray:
    """[n] (user, second, item) as records, so that `np.isin` compares all three values together."""
    columns = np.stack([user_ids, events.timestamps, events.item_ids], axis=1)
    return np.ascontiguousarray(columns).view([("", np.int64)] * 3).ravel()


def _positives_note(before: Mapping[str, int], added: Mapping[str, int]) -> Iterator[str]:
    """Yield a caution if the share of positive labels is far from the dataset's: the label rule may differ."""
    counts = [(one["positives"], one["exposures"]) for one in (before, added)]
    if not all(exposures for _, exposures in counts):
        return
    share, new = (positives / exposures for positives, exposures in counts)
    by_chance = 4 * math.sqrt(share * (1 - share) / added["exposures"])
    # Odds, because .02 and .1 differ as much as .98 and .9.
    odds, new_odds = ((p + _LEAST_ODDS) / (1 - p + _LEAST_ODDS) for p in (share, new))
    if abs(new - share) > by_chance and abs(math.log(new_odds / odds)) >= math.log(_ODDS_RATIO):
        yield (
            f"caution: {new:.1%} of the {added['exposures']:,} appended labels are positive, of the earlier ones "
            f"{share:.1%}; are they labels of the same rule?"
        )


def _report_known(staged: Staged, table: pa.Table, known: np.ndarray) -> None:
    """Count known events; if the policy is "error", raise ValueError with file and row of the first known event."""
    if staged.log.policy.duplicate_event == "error":
        path, row = staged.locate(int(table["order"].to_numpy()[known].min()))
        rows = np.full(known.size, row)
        staged.log.handle("duplicate_event", known, path, rows, lambda _: "an earlier version has this event already")
    staged.log.dropped["known_event"] += int(known.sum())


def _manifest(
    dataset: Dataset, added: dict[str, Any], changes: dict[str, Any], sources: list[dict[str, Any]], split: Split | None
) -> dict[str, Any]:
    """The manifest of the version, see `commit_version`. Raises ValueError if `split` leaves no event for a part."""
    old = {name: value for name, value in dataset.manifest.items() if name != "event_files"}
    counts = dict(old["counts"])
    for name in ("events", "exposures", "positives"):
        counts[name] += added[name]
    counts["items"] += added["new_items"]
    counts["users"] += added["new_users"]
    seconds = [*old["seconds"], *(added["seconds"] or ())]
    if split is not None:
        cuts = date_cuts(split)
        if not min(seconds) < cuts[0].timestamp <= cuts[1].timestamp <= max(seconds):
            raise ValueError(
                f"{dataset.root}: its events are from {text_of(min(seconds))} to {text_of(max(seconds))}: train until "
                f"{text_of(cuts[0].timestamp)} and valid until {text_of(cuts[1].timestamp)} leave a part without "
                "events; give dates between them"
            )
        changes["split"] = cut_facts(split, cuts)
    return {
        **old,
        **changes,
        "counts": counts,
        "parts": {},
        "base": chain_base(dataset.manifest),
        "added": added,
        "seconds": [min(seconds), max(seconds)],
        "sources": sources,
    }
