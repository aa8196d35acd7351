"""The job of `hllm forget`: forgets ids in a dataset, then in everything below given folders that was made from it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from hllm_torchrec.common.urls import url_of
from hllm_torchrec.creative.forgotten_titles import forget_items, forget_users
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.forgetting import DatasetReport, Names, forget
from hllm_torchrec.data.new_item_journal import JOURNAL as JOURNAL_FILE
from hllm_torchrec.data.remote_changes import mirrored_dataset
from hllm_torchrec.data.rewriting import TABLES
from hllm_torchrec.data.tombstones import ITEMS, USERS
from hllm_torchrec.lifecycle.erased_runs import forget_in_run
from hllm_torchrec.lifecycle.night_state import NIGHT_LOCK, hold_nights
from hllm_torchrec.lifecycle.remaining_bytes import files_with
from hllm_torchrec.lifecycle.traces import (
    CLUSTERS,
    EVENTS,
    INDEX,
    JOURNAL,
    PREDICTIONS,
    RUN,
    STORE,
    TITLES,
    Place,
    Target,
    Trace,
    forget_in_events,
    forget_in_journal,
    forget_in_predictions,
    forget_in_store,
    places,
)


@dataclass
class JobReport:
    """Results for the dataset and for every place that was found; remaining: files that still contain an id."""

    dataset: DatasetReport
    traces: list[Trace] = field(default_factory=list)
    remaining: list[Path] = field(default_factory=list)

    @property
    def left(self) -> list[Trace]:
        """Results for places that the operator must examine."""
        return [trace for trace in self.traces if trace.left]


def forget_everywhere(
    dataset: Path,
    names: Names,
    folders: Sequence[Path] = (),
    predictions: Sequence[Path] = (),
    *,
    erase: bool = False,
    dry_run: bool = False,
) -> JobReport:
    """Forget ids in a dataset, and in all files and folders below `folders` that `traces.places` recognizes.

    If the call is killed, a repeated call completes the work. The dataset is changed first, so that no job that starts
    in the meantime writes an id again.

    Args:
        dataset: folder or URL of the dataset.
        predictions: folders, outside of the dataset's runs, with prediction files of `hllm evaluate` that use this
            dataset's dense ids.
        erase: also remove every byte of the ids: see `data.forgetting.forget` and `forget_in_run`.

    Raises:
        ValueError: an error of `data.forgetting.forget` or of a `forget_in_*`; a folder does not exist; or a night is
            running in a folder (it would write embeddings and predictions from events that it has already read).
    """
    for folder in (*folders, *predictions):
        if url_of(folder) is not None:
            raise ValueError(
                f"{url_of(folder)}: only a dataset can forget ids at a URL: copy what lies there into a folder, give "
                "that folder, and upload it again"
            )
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; give folders that may contain the ids")
    url = url_of(dataset)
    if url is not None:
        with mirrored_dataset(url) as folder:
            return forget_everywhere(folder, names, folders, predictions, erase=erase, dry_run=dry_run)
    with ExitStack() as stack:
        if not dry_run:
            for nights in _nights(folders):
                stack.enter_context(hold_nights(nights))
        return _forget_everywhere(dataset, names, folders, predictions, erase, dry_run)


def _nights(folders: Sequence[Path]) -> list[Path]:
    """Return the folders of nights among `folders`, below them, and among their parents."""
    files = {file for folder in folders for file in (folder.parent / NIGHT_LOCK, *folder.rglob(NIGHT_LOCK))}
    return sorted({file.parent.resolve() for file in files if file.exists()})


def _forget_everywhere(
    dataset: Path, names: Names, folders: Sequence[Path], predictions: Sequence[Path], erase: bool, dry_run: bool
) -> JobReport:
    report = JobReport(forget(dataset, names, erase=erase, dry_run=dry_run))
    opened = Dataset.open(dataset)
    target = Target(names, opened, report.dataset.ids(USERS), report.dataset.ids(ITEMS), erase, dry_run)
    report.traces.append(forget_in_journal(dataset / JOURNAL_FILE, target))
    for place in _all_places(opened, folders, predictions):
        report.traces.append(_forget_in(place, target))
    if erase and not dry_run:
        searched = [dataset, *folders, *predictions]
        kinds = {column: names.of(name) for name, columns in TABLES.items() for column in columns}
        report.remaining = list(files_with(searched, [*names.users, *names.items], kinds))
    return report


def _all_places(dataset: Dataset, folders: Sequence[Path], predictions: Sequence[Path]) -> Iterator[Place]:
    """Yield each place once, even if the folders overlap."""
    seen: set[Path] = set()
    # `predictions` first: a place below folders of both kinds then counts as one with this dataset's ids.
    for folder, fits in (*((one, True) for one in predictions), *((one, None) for one in folders)):
        for place in places(folder, dataset, fits):
            if place.path.resolve() not in seen:
                seen.add(place.path.resolve())
                yield place


def _forget_in(place: Place, target: Target) -> Trace:
    names = target.names
    if place.kind == STORE:
        return forget_in_store(place.path, target)
    if place.kind == PREDICTIONS:
        return forget_in_predictions(place, target)
    if place.kind == JOURNAL:
        return forget_in_journal(place.path, target)
    if place.kind == EVENTS:
        return forget_in_events(place, target)
    if place.kind == RUN:
        return forget_in_run(place, target)
    if place.kind == CLUSTERS:
        return Trace(place.path, CLUSTERS, *forget_users(place.path, names.users, target.dry_run))
    if place.kind == TITLES:
        return Trace(place.path, TITLES, forget_items(place.path, names.items, target.dry_run))
    assert place.kind == INDEX
    found = any(files_with([place.path], names.items))
    return Trace(place.path, INDEX, int(found), "write the index again (hllm index)" if found else "")
