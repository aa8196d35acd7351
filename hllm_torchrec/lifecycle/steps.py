"""Steps of a night, in order; each can be repeated, and returns the facts that later steps read.

A step is a function of a `Night` that all ranks call; work that only one process may do runs on rank 0.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hllm_torchrec.common.errors import Preempted
from hllm_torchrec.common.seconds import text_of
from hllm_torchrec.common.terminal import say
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.append import append_events, dataset_sources
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.pins import pin_version, remove_pin
from hllm_torchrec.data.predictions import save_predictions
from hllm_torchrec.data.sources.base import Source
from hllm_torchrec.data.sources.registry import build_source
from hllm_torchrec.data.split import Split
from hllm_torchrec.data.table_facts import describe_append
from hllm_torchrec.distributed.coordination import run_on_rank_zero
from hllm_torchrec.evaluation.model_comparison import compare
from hllm_torchrec.evaluation.regression_gate import compare_with_baseline
from hllm_torchrec.evaluation.run_loader import LoadedRun, load_run, run_config
from hllm_torchrec.evaluation.scoring import score_split
from hllm_torchrec.evaluation.sinks import write_json
from hllm_torchrec.inference.item_embedding import embed_items
from hllm_torchrec.inference.user_embedding import embed_users, user_facts
from hllm_torchrec.lifecycle.night_config import PLACE, NightConfig
from hllm_torchrec.lifecycle.night_state import NIGHTS, NightState, unfinished_nights
from hllm_torchrec.lifecycle.releases import RELEASES, Release, named_releases, publish, read_alias
from hllm_torchrec.models.fingerprint import item_facts
from hllm_torchrec.training.trainer_setup import build_trainer

RUNS, STORES = "runs", "stores"
SPLIT = "test"
"""Part of the new exposures on which the gate compares the models."""


@dataclass(frozen=True)
class Night:
    """A night on this rank: its configuration, its state, and the device."""

    config: NightConfig
    state: NightState
    device: torch.device

    @property
    def folder(self) -> Path:
        """Folder of all nights."""
        return Path(self.config.folder)

    @property
    def work(self) -> Path:
        """Folder of this night's state and evaluation."""
        return self.folder / NIGHTS / self.state.night

    @property
    def run(self) -> Path:
        """Folder of this night's run."""
        return self.folder / RUNS / self.state.night


Step = Callable[[Night], dict[str, Any]]


def _on_rank_zero(step: Step) -> Step:
    """Let rank 0 run a step; every rank returns its facts."""
    return wraps(step)(lambda night: run_on_rank_zero(lambda: step(night)))


# ------------------------------------------------------------------ append


@_on_rank_zero
def append(night: Night) -> dict[str, Any]:
    """Append the night's files as a new version, in which the last events by time are held out."""
    config, source = night.config, _source(night.config, night.state.night)
    # This night starts from the published run. If there is none, it starts from the run in the configuration, which was
    # trained on the previous version.
    last = read_alias(night.folder, "current")
    if last is not None and not Path(last.run).is_dir():
        raise ValueError(
            f"{night.folder}/current: its run {last.run} is gone; publish another release: hllm rollback --folder "
            f"{night.folder}"
        )
    dataset = Dataset.open(config.dataset)
    version = version_of_source(dataset, source)
    if version is None:
        split = held_out_split(new_seconds(source, dataset), config.held_out)
        entry = append_events(source, dataset.root, split=split)
        assert entry is not None, "events after the last one are new"
        version = int(entry["version"])
        # Printed, not returned: the night's state is not searched when users are forgotten, and notes may have raw ids.
        notes = Dataset.open(config.dataset, version).manifest.get("notes", ())
        say("\n".join([describe_append(entry), *(f"  {note}" for note in notes)]))
    before = max(version - 1, 1)  # 1: the dataset was prepared from the night's files
    pin_version(dataset.root, version, night.work)  # until the run pins it, because others may append and prune
    return {
        "version": version,
        "start_from": config.start_from if last is None else last.run,
        "checkpoint": "best" if last is None else last.checkpoint,
        "train_since": train_cut(dataset, before) if last is None else last.trained_until,
        "train_late_after": before if last is None else last.version,
        "train_until": train_cut(dataset, version),
    }


def _source(config: NightConfig, night: str) -> Source:
    append = config.append
    path, items = (None if text is None else Path(text.replace(PLACE, night)) for text in (append.path, append.items))
    return build_source(append.source, path, items)


def new_seconds(source: Source, dataset: Dataset) -> np.ndarray:
    """Sorted seconds (int64) of the source's events that are later than every event of the dataset.

    Raises:
        ValueError: these events have fewer than three different seconds, which are too few to divide.
    """
    last = int(dataset.manifest["seconds"][1])
    parts = [chunk.table["timestamp"].drop_null().to_numpy() for chunk in source.events()]
    found = np.concatenate([np.empty(0, np.int64), *parts])
    later = np.sort(found[found > last])
    if np.unique(later).size < 3:
        raise ValueError(
            f"{', '.join(map(str, source.event_files))}: {later.size} events after {text_of(last)}, the last one of "
            f"{dataset.root}: a night needs new events in at least three seconds: one each for train, valid and test"
        )
    return later


def held_out_split(seconds: np.ndarray, held_out: float) -> Split:
    """The split by date that holds out the last share of the sorted `seconds`: first half valid, second half test.

    Each part has at least one second with events, and a second is never divided between parts.
    """
    distinct = np.unique(seconds)
    cuts = seconds[(np.array([1 - held_out, 1 - held_out / 2]) * seconds.size).astype(np.int64)]
    first = min(max(int(np.searchsorted(distinct, cuts[0])), 1), distinct.size - 2)
    second = min(max(int(np.searchsorted(distinct, cuts[1])), first + 1), distinct.size - 1)
    return Split("date", train_until=int(distinct[first]), valid_until=int(distinct[second]))


def version_of_source(dataset: Dataset, source: Source) -> int | None:
    """The version that was made from the source's files; None if there is none."""
    fingerprint = source.fingerprint()
    found = (one["version"] for one in dataset_sources(dataset) if one["fingerprint"] == fingerprint)
    return next(found, None)


def train_cut(dataset: Dataset, version: int) -> int:
    """The first second after the training part of a version.

    Raises:
        ValueError: the dataset is not split by time.
    """
    split = Dataset.open(dataset.root, version).manifest["split"]
    if not split.get("cut_timestamps"):
        raise ValueError(
            f"{dataset.root}: split by {split['rule']!r}: nights need a dataset divided by time (--split time or date)"
        )
    return int(split["cut_timestamps"][0])


# ------------------------------------------------------------------ train


def train(night: Night) -> dict[str, Any]:
    """Train the published run (or `start_from`) on the new events, or, without a run, a new model on all events.

    An interrupted training is resumed.
    """
    run_on_rank_zero(lambda: _check_start(night))
    trainer = build_trainer(training_config(night), night.device)
    try:
        trainer.run()
    except Preempted as request:
        raise Preempted(
            f"asked to leave after step {trainer.step}, which is saved: start the same command again",
            interrupted=request.interrupted,
        ) from None
    run_on_rank_zero(lambda: remove_pin(Path(night.config.dataset), night.work))
    return {"run": str(night.run), "steps": trainer.step, "metrics": trainer.metrics}


def _check_start(night: Night) -> None:
    """Raise ValueError if another release was made current since the night began, for example by a rollback."""
    begun, current = night.state.facts("append")["start_from"], read_alias(night.folder, "current")
    # This night is current if it was killed after the aliases had moved.
    if current is None or current.name == night.state.night:
        return
    if begun is None or Path(begun).name != Path(current.run).name:
        raise ValueError(
            f"night {night.state.night} began from {begun}, and {night.folder / 'current'} is {current.name} now; "
            f"remove {night.work} and {night.run} to begin it again from there"
        )


def training_config(night: Night) -> Config:
    """The configuration of the night's training."""
    facts = night.state.facts("append")
    options: dict[str, Any] = {
        "output": str(night.run),
        "resume": True,
        "data.dataset": night.config.dataset,
        "data.version": facts["version"],
    }
    if facts["start_from"] is None:
        return night.config.train_config(options, increment=False)
    options |= {
        "start_from": facts["start_from"] if facts["checkpoint"] == "best" else facts["checkpoint"],
        "start_from_optimizer": True,
        "data.train_since": facts["train_since"],
        "data.train_late_after": facts.get("train_late_after"),  # missing in states of older versions of this library
    }
    return night.config.train_config(options, increment=True)


# ------------------------------------------------------------------ evaluate, gate


def evaluate(night: Night) -> dict[str, Any]:
    """Compare the night's model with the run that it started from, if any, on the new test exposures."""
    facts = night.state.facts("append")
    night.state.facts("train")
    runs = {"new": (night.run, "best")}
    if facts["start_from"] is not None:
        runs["last"] = (Path(facts["start_from"]), facts["checkpoint"])
    predictions = {name: _score(night, name, run, which) for name, (run, which) in runs.items()}
    metrics = compare(predictions, split=SPLIT, draws=night.config.gate.draws)
    run_on_rank_zero(lambda: write_json(metrics, night.work / "metrics.json"))
    return {"auc": {name: metrics["models"][name]["auc"] for name in runs}, "rows": metrics["rows"]}


def _score(night: Night, name: str, run: Path, which: str) -> Path:
    """Score the test exposures of the night's version of the dataset with a run; returns the predictions' directory."""
    loaded = _load(night, run, which)
    experiment = loaded.experiment
    if not experiment.hllm.fusion.has_queries:
        raise ValueError(f"{run}: objective.fusion none ranks no exposures; nights compare models by AUC")
    target = night.work / "predictions" / name
    loader = experiment.loader(SPLIT, experiment.config.evaluation.batch_users)
    with loaded.weights, experiment.evaluation_items():
        columns = score_split(experiment, loader)
        save_predictions(columns, target)
    return target


def _load(night: Night, run: Path, which: str) -> LoadedRun:
    """Load a run's model for the night's version of the dataset, which may have more ids than the run's version."""
    config = run_config(run, Path(night.config.dataset))
    config = replace(config, data=replace(config.data, version=night.state.facts("append")["version"]))
    return load_run(run, which, night.device, config)


@_on_rank_zero
def gate(night: Night) -> dict[str, Any]:
    """Compare the AUC with the minimum and with the AUC of the run that training started from.

    Only status "pass" permits publishing.
    """
    verdict = _verdict(night)
    if verdict["status"] == "pass":
        _check_start(night)  # a refused night may be judged again, but not once a later night has been published
    return verdict


def _verdict(night: Night) -> dict[str, Any]:
    settings, auc = night.config.gate, night.state.facts("evaluate")["auc"]
    if auc["new"] is None or auc["new"] < settings.least_auc:
        return {"status": "fail", "text": f"FAIL: AUC {auc['new']}, at least {settings.least_auc:g} is required"}
    if "last" not in auc:
        return {"status": "pass", "text": f"PASS: AUC {auc['new']:.5f}, the first model"}
    metrics = json.loads((night.work / "metrics.json").read_text(encoding="utf-8"))
    verdict = compare_with_baseline(metrics, "last", settings.max_drop)
    unsure_passes = verdict.status == "unsure" and settings.on_unsure == "pass"
    return {"status": "pass" if unsure_passes else verdict.status, "text": verdict.text, "drop": verdict.drop}


# ------------------------------------------------------------------ embed, publish


def embed(night: Night) -> dict[str, Any]:
    """Embed new and changed items and users into stores named by the model's facts, so each store is of one model."""
    _require_pass(night)
    wanted = night.config.stores
    facts: dict[str, Any] = {"items": None, "users": None}
    loaded = _load(night, night.run, "best")
    experiment = loaded.experiment
    with loaded.weights:
        if wanted.items and experiment.item_encoder is not None:
            path = _store(night, "items", item_facts(experiment))
            report = embed_items(experiment, path, wanted.dtype)
            facts |= {"items": str(path), "embedded_items": report.encoded}
        if wanted.users:
            path = _store(night, "users", user_facts(loaded))
            users = embed_users(loaded, path, dtype=wanted.dtype)
            facts |= {"users": str(path), "embedded_users": users.encoded}
    return facts


def _store(night: Night, kind: str, facts: Mapping[str, Any]) -> Path:
    """Folder of the store; its name is a hash of the facts (among them the weights' fingerprint) and the data type."""
    text = json.dumps({**facts, "dtype": night.config.stores.dtype}, sort_keys=True)
    return night.folder / STORES / f"{kind}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


@_on_rank_zero
def publish_release(night: Night) -> dict[str, Any]:
    """Make this night's release `current`, and remove the runs and stores of nights that are no longer needed."""
    _require_pass(night)
    _check_start(night)  # do not replace a later night that has been published since
    appended, embedded = night.state.facts("append"), night.state.facts("embed")
    release = Release(
        name=night.state.night,
        run=str(night.run),
        dataset=str(Path(night.config.dataset).resolve()),
        version=appended["version"],
        trained_until=appended["train_until"],
        items=embedded["items"],
        users=embedded["users"],
        auc=night.state.facts("evaluate")["auc"]["new"],
    )
    publish(night.folder, release)
    removed = remove_old(night.folder, night.config.keep, {release.name, *unfinished_nights(night.folder)})
    return {"release": release.name, "removed": removed}


def remove_old(folder: Path, keep: int, needed: Set[str]) -> list[str]:
    """Remove old runs, releases and stores; returns the names of the runs and stores.

    The runs and releases of the newest `keep` nights, of the `needed` nights and of the aliases are kept. So are the
    stores that a kept release links to, or that a needed night has written.
    """
    nights = sorted(path.name for path in (folder / RUNS).iterdir())
    kept = {*nights[-keep:], *needed, *named_releases(folder)}
    removed = [name for name in nights if name not in kept]
    for name in removed:
        for path in (folder / RELEASES / name, folder / RUNS / name):
            shutil.rmtree(path, ignore_errors=True)
    # Remove releases first: the links of the remaining ones show which stores are in use. A needed night may have
    # embedded without being published yet, so the stores in its state are kept too.
    linked = [Release.read(path.parent) for path in (folder / RELEASES).glob("*/release.json")]
    stores = {path for release in linked for path in (release.items, release.users)}
    embedded = [NightState.read(folder, name).done.get("embed", {}) for name in needed]
    stores |= {str(Path(one[part]).resolve()) for one in embedded for part in ("items", "users") if one.get(part)}
    for path in (folder / STORES).glob("*-*"):
        if str(path.resolve()) not in stores:
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path.name)
    return removed


def _require_pass(night: Night) -> None:
    found = night.state.facts("gate")
    if found["status"] != "pass":
        raise ValueError(f"night {night.state.night}: the gate has refused its model: {found['text']}")


RUN_STEP: dict[str, Step] = {
    "append": append,
    "train": train,
    "evaluate": evaluate,
    "gate": gate,
    "embed": embed,
    "publish": publish_release,
}
