"""`prepare`: converts a source into a dataset directory in bounded memory.

The events are read twice: first from the source, to write them to disk partitioned by user (`event_partitions`); then
from these partitions, sorted by user, to write the sequences of the three parts (`split`, `sequences`). Memory is
bounded by the largest partition, the raw ids of items and users, and a few bytes for each of them; it does not grow
with the number of events. The directory is published by a rename, so an incomplete one never appears.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from hllm_torchrec.common.atomic_files import atomic_folder, recover_folder
from hllm_torchrec.data.bad_rows import BadRowLog, BadRows
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.event_partitions import SortedPartitions, core_filter
from hllm_torchrec.data.feature_spellings import check_spellings
from hllm_torchrec.data.item_catalogue import ItemCatalogue, Vocabulary
from hllm_torchrec.data.manifest import (
    EVENTS,
    ITEM_COUNTS,
    MANIFEST,
    SCHEMA_VERSION,
    read_manifest,
    write_manifest,
)
from hllm_torchrec.data.pins import pinned_versions
from hllm_torchrec.data.sequences import SequenceWriter
from hllm_torchrec.data.sources.base import Source
from hllm_torchrec.data.split import Cut, Split, check_not_empty, cut_facts, cuts_of
from hllm_torchrec.data.staging import Staged, default_partitions, stage
from hllm_torchrec.data.tombstones import FILE, FORGOTTEN, Tombstones
from hllm_torchrec.data.user_table import UserTable
from hllm_torchrec.data.versions import (
    BASES,
    commit_version,
    draft_folder,
    folder_facts,
    newest_version,
    remove_versions,
    version_name,
    write_lock,
)
from hllm_torchrec.data.vocabulary import compute_marks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Options:
    """Options of a preparation with defaults resolved; the fields are the arguments of `prepare`."""

    split: Split
    policy: BadRows
    min_events: int
    core: str
    users_per_row_group: int
    partitions: int

    def __post_init__(self) -> None:
        if self.core not in ("iterative", "published"):
            raise ValueError(f"core={self.core!r} is not one of iterative, published; choose one of them")
        for name, least in (("min_events", 0), ("users_per_row_group", 1), ("partitions", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


def prepare(
    source: Source,
    output_dir: str | Path,
    *,
    split: Split | str = "time",
    policy: BadRows | None = None,
    min_events: int | None = None,
    core: str = "iterative",
    users_per_row_group: int = 256,
    partitions: int | None = None,
    overwrite: bool = False,
    extend: bool = False,
    allow_fewer: bool = False,
) -> Path:
    """Write the dataset directory `output_dir` (layout: module docstring of `data.dataset`) and return its path.

    An existing dataset that was made from the same files with the same options is reused. For a source without
    timestamps the row number is the second, so that row order is time order, and the manifest says
    `has_timestamps: false`.

    Args:
        source: the events, items and users to read.
        output_dir: directory to create.
        split: division of the events into train, valid and test, or only the name of its rule.
        policy: handling of bad rows; None: the source's default.
        min_events: k of the k-core; None: the source's default; 0: no filter.
        core: "iterative" repeats the filter until nothing changes; "published" is the single pass of the published
            Books protocol.
        users_per_row_group: maximum number of users in a row group of the sequences, the unit that is distributed
            over ranks and workers (fewer if a file would have fewer than 32 groups).
        partitions: number of partitions of the users on disk; None: derived from the size of the event files.
        overwrite: replace another dataset. Its files are removed, except those of versions that runs have pinned.
        extend: prepare all data of a source that has grown, as a new version: existing users, items and feature values
            keep their ids, new ones get the next ids.
        allow_fewer: allow `extend` from a source with fewer events than the dataset.

    Raises:
        ValueError: a row is bad (see `bad_rows.BadRows`), a part of the split is empty, `extend` has fewer events than
            the dataset, or `output_dir` contains something else. Nothing is written then.
    """
    options = _Options(
        split=Split(split) if isinstance(split, str) else split,
        policy=policy or source.policy,
        min_events=source.min_events if min_events is None else min_events,
        core=core,
        users_per_row_group=users_per_row_group,
        partitions=default_partitions(source) if partitions is None else partitions,
    )
    output = Path(output_dir).absolute()
    request = _request(source, options)
    recover_folder(output)
    existing = _look_at(output, request, overwrite=overwrite, extend=extend)
    # A dataset with appends has more than its first source, so only --overwrite or --extend replaces it.
    replaces = (overwrite or extend) and existing is not None and bool(existing.get("appends"))
    if existing is not None and existing["request"] == request and not replaces:
        logger.info("%s is prepared already from the same source and options: reused", output)
    elif (output / MANIFEST).is_file():
        _write_new_base(source, options, output, request, extend=extend, allow_fewer=allow_fewer)
        logger.info("%s: prepared", output)
    else:
        with atomic_folder(output) as target:
            scratch = target.parent / "scratch"
            scratch.mkdir()
            manifest = _run(source, options, target, scratch, None)
            write_manifest(target, _with_marks(target, {**manifest, "request": request}))
        if read_manifest(output)["request"] != request:
            raise ValueError(f"{output}: another process has prepared another dataset there; choose another folder")
        logger.info("%s: prepared", output)
    return output


def _write_new_base(
    source: Source, options: _Options, root: Path, request: dict[str, Any], *, extend: bool, allow_fewer: bool
) -> None:
    """Add a version with a new base to the dataset in `root`. extend: existing ids are kept.

    Raises:
        ValueError: see `prepare`.
    """
    with write_lock(root):
        old, forgotten = Dataset.open(root) if extend else None, _forgotten(root, extend)
        version = newest_version(root) + 1
        name = f"{BASES}/{version_name(version)}"
        # Read before anything is written, because a damaged pin is an error.
        pinned: Collection[int] = () if extend else pinned_versions(root)
        with draft_folder(root, BASES, version) as target:
            at_least = 0 if old is None or allow_fewer else old.manifest["counts"]["events"]
            scratch = target.parent / "scratch"
            manifest = _run(
                source, options, target, scratch, old, at_least=at_least, is_first=False, forgotten=forgotten
            )
            if forgotten:
                # Relative to the draft folder, which `_with_marks` opens as a dataset; set relative to the root below.
                manifest[FORGOTTEN] = FILE.format(version)
                forgotten.write(target / FILE.format(version))
            files = folder_facts(target, name)
            manifest = _with_marks(target, {**manifest, "request": request})
            if forgotten:
                manifest[FORGOTTEN] = f"{name}/{FILE.format(version)}"
        split = manifest["split"]
        base = {
            "folder": name,
            "event_files": [one for one in files if one.startswith(f"{name}/{EVENTS}/")],
            "cuts": [split["cut_timestamps"], split["cut_orders"]],
            "seconds": manifest["seconds"],
        }
        sources = [{"version": version, "fingerprint": request["source_fingerprint"]}]
        chain = {"base": base, "appends": [], "files": files, "sources": sources}
        commit_version(root, version, {**manifest, **chain})
        if not extend:
            # The factors were fitted to the items of the replaced dataset.
            (root / "vectors" / "factors.npy").unlink(missing_ok=True)
            remove_versions(root, pinned)


def _forgotten(root: Path, extend: bool) -> Tombstones:
    """The tombstones of the existing dataset, because a new export may still contain forgotten ids."""
    try:
        before = Tombstones.read(root, read_manifest(root, check_files=False))
    except ValueError:  # damaged, which is why it is overwritten
        return Tombstones()
    return before if extend else before.without_numbers()


def _with_marks(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the marks of the ids in the base in `folder`."""
    marks = compute_marks(Dataset(folder, manifest))
    return {**manifest, "vocabulary": {name: mark.to_json() for name, mark in marks.items()}}


def _request(source: Source, options: _Options) -> dict[str, Any]:
    """All inputs and options that determine the dataset, as JSON values: equal requests give equal datasets."""
    return {
        "schema_version": SCHEMA_VERSION,
        "source": source.name,
        "source_fingerprint": source.fingerprint(),
        "source_options": source.options,
        "split": options.split.to_dict(),
        "policy": options.policy.to_dict(),
        "min_events": options.min_events,
        "core": options.core,
        "users_per_row_group": options.users_per_row_group,
        "partitions": options.partitions,
    }


def _look_at(output: Path, request: dict[str, Any], *, overwrite: bool, extend: bool) -> dict[str, Any] | None:
    """The manifest of the dataset at `output`; None if there is no dataset, or a damaged one that may be overwritten.

    Raises:
        ValueError: `output` contains something else, or another dataset that must not be replaced.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / MANIFEST).is_file():
        raise ValueError(f"{output} exists and is not a prepared dataset; it is not overwritten. Choose another folder")
    try:
        manifest = read_manifest(output)
    except ValueError:
        # A damaged dataset can be overwritten, but not extended: its ids cannot be read.
        if overwrite and not extend:
            return None
        raise
    if manifest["request"] == request or overwrite or extend:
        return manifest
    different = [key for key in request if manifest["request"].get(key) != request[key]]
    raise ValueError(
        f"{output} holds another dataset ({manifest['name']}; different: {', '.join(different)}). Choose "
        "another folder, or overwrite it (--overwrite), or keep its ids and add new events (--append) or a full "
        "export (--extend)"
    )


def _run(
    source: Source,
    options: _Options,
    target: Path,
    scratch: Path,
    old: Dataset | None,
    *,
    at_least: int = 0,
    is_first: bool = True,
    forgotten: Tombstones | None = None,
) -> dict[str, Any]:
    """Run all steps from the source to the files in `target`; return the manifest without its files.

    at_least: minimum number of events; a source with fewer is refused.
    is_first: True for a dataset without other versions: also write the sequences as Parquet files and the item counts.
    """
    staged = stage(source, options.policy, options.partitions, scratch, old, forgotten=forgotten)
    partitions, users, catalogue, log = staged.partitions, staged.users, staged.catalogue, staged.log
    user_counts, item_counts = partitions.counts(len(users), len(catalogue))
    if "events" in log.facts and (idle := int((item_counts == 0).sum())):
        log.facts["events"].extra.append(f"{idle:,} of {len(catalogue):,} items have no event")
    user_counts, item_counts = _filter(partitions, options, (user_counts, item_counts), log)
    total = int(user_counts.sum())
    if total == 0:
        raise ValueError(f"{source.name}: no event is left; check the event file, the policy and min_events")
    if total < at_least:
        raise ValueError(
            f"{source.name}: the source has {total:,} events, the dataset {at_least:,}: --extend is for a full "
            "export. For a file of new events use --append; if events were removed on purpose, add --allow-fewer"
        )
    users.assign_ids(user_counts)
    item_ids = catalogue.final_ids(item_counts > 0, source.keep_items_without_events)
    cuts = cuts_of(options.split, total, partitions.times)
    num_items = int(item_ids.max())
    held_out = catalogue.held_out(options.split, item_ids)
    writer = SequenceWriter(target, options.split, cuts, held_out, options.users_per_row_group, is_first, source.schema)
    for table in tqdm(partitions, total=len(partitions.paths), desc="writing sequences", delay=5):
        writer.write(table, users.final_ids, item_ids)
    log.dropped.update({"held_out_of_train": writer.held_out_events} if options.split.hold_out_items else {})
    check_not_empty({part: facts["events"] for part, facts in writer.facts.items()}, options.split)
    if is_first:
        np.save(target / ITEM_COUNTS, writer.item_counts)
    catalogue.write(target / "items.parquet", item_ids, staged.item_words)
    users.write(target / "users.parquet", staged.user_files, staged.user_words)
    words = staged.item_words | staged.user_words | staged.context_words
    notes = check_spellings(words, log)
    _write_features(target, words)
    counts = _counts(users, num_items, writer, log, catalogue)
    return _manifest(source, options, cuts, counts, writer, staged) | {"notes": [*log.notes(), *notes]}


def _filter(
    partitions: SortedPartitions,
    options: _Options,
    counts: tuple[np.ndarray, np.ndarray],
    log: BadRowLog,
) -> tuple[np.ndarray, np.ndarray]:
    """Apply the k-core, if any; counts: events per user number and item number. Returns the remaining counts."""
    k = options.min_events
    if k <= 1:
        return counts
    core_filter(partitions, counts, k, iterative=options.core == "iterative")
    after = partitions.counts(len(counts[0]), len(counts[1]))
    log.dropped[f"outside_{k}_core"] += int(counts[0].sum() - after[0].sum())
    return after


def _write_features(target: Path, words: dict[str, Vocabulary]) -> None:
    (target / "features").mkdir()
    for name, vocabulary in words.items():
        pq.write_table(vocabulary.table(), target / "features" / f"{name}.parquet")


def _counts(
    users: UserTable, num_items: int, writer: SequenceWriter, log: BadRowLog, catalogue: ItemCatalogue
) -> dict[str, Any]:
    parts = writer.facts.values()
    return {
        "users": users.total,
        "items": num_items,
        **{key: sum(facts[key] for facts in parts) for key in ("events", "exposures", "positives")},
        "dropped": dict(sorted(log.dropped.items())),
        "kept": dict(sorted(log.kept.items())),
        "users_without_features": users.without_features,
        "user_rows_without_events": users.without_events,
        "items_with_new_text": catalogue.updated,
    }


def _manifest(
    source: Source,
    options: _Options,
    cuts: list[Cut],
    counts: dict[str, Any],
    writer: SequenceWriter,
    staged: Staged,
) -> dict[str, Any]:
    last_action = max(source.action_names, default=0)
    declared = {} if source.schema.is_default else {"event_schema": source.schema.to_json()}
    if staged.context_words:
        declared["context_features"] = {name: {"size": words.size} for name, words in staged.context_words.items()}
    return {
        **declared,
        "name": source.name,
        "counts": counts,
        "parts": writer.facts,
        "seconds": list(writer.seconds),
        "split": cut_facts(options.split, cuts),
        "label_rule": source.label_rule,
        "has_timestamps": source.has_timestamps,
        "actions": {"number": last_action + 1, "names": {str(k): v for k, v in source.action_names.items()}},
        "text_columns": list(source.text_columns),
        "item_features": {name: {"size": vocabulary.size} for name, vocabulary in staged.item_words.items()},
        "user_features": {name: {"size": vocabulary.size} for name, vocabulary in staged.user_words.items()},
        "source": {
            "name": source.name,
            "files": [path.name for path in (*source.event_files, *source.other_files)],
            "license": source.license_note,
        },
    }
