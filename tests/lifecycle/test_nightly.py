"""The night as one job: what two nights do, steps alone, a rejected model, and kills anywhere."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hllm_torchrec.common.locks import hold_lock
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.late_events import late_events
from hllm_torchrec.data.pins import pinned_versions
from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.launch import nightly, rollback
from hllm_torchrec.lifecycle.night_config import NightConfig
from hllm_torchrec.lifecycle.night_state import STEPS, NightState
from hllm_torchrec.lifecycle.releases import Release, publish, read_alias
from hllm_torchrec.lifecycle.releases import rollback as rollback_releases
from hllm_torchrec.lifecycle.steps import Night, held_out_split, publish_release, remove_old
from hllm_torchrec.store.store import EmbeddingStore
from tests.helpers.distributed import forks
from tests.helpers.schedules import acting_before
from tests.helpers.training_fixtures import lines
from tests.lifecycle.conftest import World


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def test_held_out_events_are_the_last_and_every_part_has_a_second() -> None:
    def cuts(seconds: list[int], share: float) -> tuple[int | None, int | None]:
        split = held_out_split(np.array(seconds), share)
        return split.train_until, split.valid_until

    assert cuts(list(range(100, 200)), 0.2) == (180, 190)
    assert cuts([1, 1, 1, 1, 1, 1, 2, 3], 0.2) == (2, 3)
    assert cuts([1, 2, 3, 3, 3, 3, 3, 3], 0.5) == (2, 3)
    assert cuts([1, 2, 3], 0.99) == (2, 3) == cuts([1, 2, 3], 0.01)


@pytest.mark.slow
def test_a_night_trains_on_what_came_since_and_moves_the_alias(after_one: World, after_two: World) -> None:
    first, second = after_one.state("day-03"), after_two.state("day-04")
    assert list(first) == list(second) == list(STEPS)
    assert first["append"]["start_from"] is None and Path(second["append"]["start_from"]).name == "day-03"
    assert second["append"]["train_since"] == first["append"]["train_until"]
    assert [one["append"]["version"] for one in (first, second)] == [2, 3]
    assert list(first["evaluate"]["auc"]) == ["new"] and list(second["evaluate"]["auc"]) == ["new", "last"]
    current, previous = (read_alias(after_two.nights, alias) for alias in ("current", "previous"))
    assert current is not None and previous is not None and (current.name, previous.name) == ("day-04", "day-03")
    assert current.version == 3 and current.trained_until == second["append"]["train_until"]
    assert current.auc == second["evaluate"]["auc"]["new"]
    assert read_alias(after_one.nights, "previous") == read_alias(after_one.nights, "current")


@pytest.mark.slow
def test_a_night_trains_on_every_new_event_once_and_embeds_what_changed(after_one: World, after_two: World) -> None:
    data, cut = Dataset.open(after_two.dataset), after_one.state("day-03")["append"]["train_until"]
    rows = data.sequences(data.row_groups("train"))
    steps = lines(after_two.nights / "runs" / "day-04", "step")
    trained = round(sum(line["samples_per_second"] * line["seconds"] for line in steps))
    late = late_events(data, str(after_two.dataset), 2, cut)
    assert data.manifest["added"]["late_events"] == late[0].size == 1
    assert trained == (rows.timestamps >= cut).sum() + 1 and (rows.timestamps < cut).any()
    first, second = after_one.state("day-03")["embed"], after_two.state("day-04")["embed"]
    assert Path(first["items"]).name == Path(second["items"]).name, "the Item LLM is frozen: the same store"
    assert first["embedded_items"] == 28 and second["embedded_items"] == 2
    assert Path(first["users"]).name != Path(second["users"]).name, "another model has another store"
    link = after_two.nights / "current" / "users"
    assert len(EmbeddingStore.open(link).snapshot()) == second["embedded_users"] == data.num_users - 1


@pytest.mark.slow
def test_a_done_night_is_not_repeated_and_a_rollback_decides_where_the_next_one_starts(
    after_two: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = after_two.copy(tmp_path / "world")
    capsys.readouterr()
    assert nightly.main(world.words("day-04")) == 0
    assert capsys.readouterr().out == f"day-04: nothing is left to do; done before: {', '.join(STEPS)}\n"
    assert rollback.main(["--folder", str(world.nights)]) == 0
    assert "current: day-03 (was day-04)" in capsys.readouterr().out
    assert nightly.main(world.words("day-05", "--steps", "append")) == 0
    assert pinned_versions(world.dataset)[4] == [str(world.nights / "nights" / "day-05")]
    assert [Path(run).parent.name for run in pinned_versions(after_two.dataset)[3]] == ["runs"]
    facts = world.state("day-05")["append"]
    assert Path(facts["start_from"]).name == "day-03" and facts["version"] == 4
    assert facts["train_since"] == world.state("day-03")["append"]["train_until"]
    rollback_releases(world.nights, "day-04")
    assert nightly.main(world.words("day-05")) == 2
    assert "runs/day-03, and" in (said := capsys.readouterr().err) and "current is day-04 now; remove" in said


@pytest.mark.slow
def test_a_model_that_the_gate_refuses_is_not_published(
    after_one: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = after_one.copy(tmp_path / "world")
    world.configure(gate={"least_auc": 0.999})
    assert nightly.main(world.words("day-04")) == nightly.REJECTED
    assert "day-04: gate: FAIL: AUC 0." in capsys.readouterr().out
    assert list(world.state("day-04")) == ["append", "train", "evaluate", "gate"]
    assert nightly.main(world.words("day-04")) == nightly.REJECTED
    assert nightly.main(world.words("day-04", "--steps", "publish")) == 2
    assert "night day-04: the gate has refused its model: FAIL" in capsys.readouterr().err
    current = read_alias(world.nights, "current")
    assert current is not None and current.name == "day-03"
    world.configure(gate={"least_auc": 0.1, "max_drop": 1.0})  # judged again, with other settings
    assert nightly.main(world.words("day-04")) == 0
    current = read_alias(world.nights, "current")
    assert current is not None and current.name == "day-04"


def test_old_nights_are_removed_but_what_is_published_or_unfinished(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d", "e"):
        for kind in ("runs", "users"):
            (tmp_path / kind / name).mkdir(parents=True)
        store = tmp_path / "stores" / f"users-{name}"
        store.mkdir(parents=True)
        if name != "c":  # whose model was refused
            run = str(tmp_path / "runs" / name)
            publish(tmp_path, Release(name, run, "/data", 1, 1, users=str(store)))
    rollback_releases(tmp_path, "a")
    assert remove_old(tmp_path, 1, {"b"}) == ["c", "d", "users-c", "users-d"]
    left = {kind: sorted(path.name for path in (tmp_path / kind).iterdir()) for kind in ("runs", "releases", "stores")}
    names = ["a", "b", "e"]
    assert left == {"runs": names, "releases": names, "stores": [f"users-{name}" for name in names]}


def embedded_night(folder: Path, name: str, start: str) -> NightState:
    """A night that began from the run `start` and has only to be published."""
    (folder / "stores" / f"users-{name}").mkdir(parents=True)
    (folder / "runs" / name).mkdir(parents=True)
    state = NightState.read(folder, name)
    for step, facts in {
        "append": {"version": 1, "start_from": str(folder / "runs" / start), "train_until": 1},
        "evaluate": {"auc": {"new": 0.6}},
        "gate": {"status": "pass"},
        "embed": {"items": None, "users": str(folder / "stores" / f"users-{name}")},
    }.items():
        state = state.with_step(step, facts)
    return state


def test_a_night_that_was_overtaken_keeps_its_stores_and_takes_no_later_ones_place(tmp_path: Path) -> None:
    config, device = NightConfig(folder=str(tmp_path)), torch.device("cpu")
    publish(tmp_path, Release("a", str(tmp_path / "runs" / "a"), "/data", 1, 1))
    late, next_one = (Night(config, embedded_night(tmp_path, name, "a"), device) for name in "bc")
    assert publish_release(next_one) == {"release": "c", "removed": []}
    with pytest.raises(ValueError, match="night b began from .*runs/a, and .*current is c now; remove"):
        publish_release(late)
    assert publish_release(next_one) == {"release": "c", "removed": []}  # killed before it was noted
    rollback_releases(tmp_path)
    publish_release(late)
    assert (tmp_path / "current" / "users").is_dir()


def test_two_processes_do_not_run_nights_of_one_folder(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(begun).copy(tmp_path / "world")
    world.nights.mkdir()
    with hold_lock(world.nights / "night.lock", "this test"):
        assert nightly.main(world.words("day-03")) == 2
    assert "nights: another process runs a night here (process" in capsys.readouterr().err


@pytest.mark.slow
def test_a_night_without_the_published_run_appends_nothing_and_names_the_remedy(
    after_one: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = after_one.copy(tmp_path / "world")
    shutil.rmtree(world.nights / "runs" / "day-03")
    assert nightly.main(world.words("day-04")) == 2
    assert f"runs/day-03 is gone; publish another release: hllm rollback --folder {world.nights}" in (
        capsys.readouterr().err
    )
    assert Dataset.open(world.dataset).version == 2


@pytest.mark.slow
def test_an_interrupted_night_says_how_it_goes_on(
    after_one: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = after_one.copy(tmp_path / "world")
    run = world.nights / "runs" / "day-04"
    with acting_before(12, lambda: os.kill(os.getpid(), signal.SIGINT), run):
        assert nightly.main(world.words("day-04")) == 130
    said = capsys.readouterr()
    assert "which is saved: start the same command again" in said.err
    assert "  appended: " in said.out and "  users: " in said.out  # what `hllm prepare --append` says
    destroy_distributed()
    assert nightly.main(world.words("day-04")) == 0 and list(world.state("day-04")) == list(STEPS)


def killed_night(words: list[str], access: int, folder: str) -> None:
    """Run a night in a process that dies before its file access of this number."""
    with acting_before(access, lambda: os._exit(9), Path(folder)):
        os._exit(nightly.main(words))


def comparable(done: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the steps of a night have done, without times and folders."""
    found = {step: {name: value for name, value in facts.items() if name != "at"} for step, facts in done.items()}
    names = {"append": ("start_from",), "train": ("run", "metrics"), "embed": ("items", "users")}
    for step, paths in names.items():
        found[step] |= {name: Path(str(found[step][name])).name for name in paths if name != "metrics"}
    # A run that was killed after its last checkpoint has nothing left to measure; vectors that a store has stay there.
    # A store of users is named by its checkpoint, which holds the run's path.
    for step, name in (
        ("train", "metrics"),
        ("embed", "embedded_items"),
        ("embed", "embedded_users"),
        ("embed", "users"),
    ):
        found[step].pop(name)
    return found


@pytest.mark.slow
def test_a_night_that_is_killed_again_and_again_ends_as_one_that_is_not(
    after_one: World, after_two: World, tmp_path: Path
) -> None:
    world, context, access, kills = after_one.copy(tmp_path / "world"), forks(), 200, 0
    while True:  # later and later, so that it comes to an end
        process = context.Process(target=killed_night, args=(world.words("day-04"), access, world.root))
        process.start()
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == 9, process.exitcode
        access, kills = 4 * access, kills + 1
    assert kills > 2  # in append, in train and in embed
    assert comparable(world.state("day-04")) == comparable(after_two.state("day-04"))
    dataset, expected = Dataset.open(world.dataset), Dataset.open(after_two.dataset)
    assert dataset.version == expected.version and dataset.manifest["counts"] == expected.manifest["counts"]
    for store in ("items", "users"):
        found, due = (EmbeddingStore.open(one.nights / "current" / store).snapshot() for one in (world, after_two))
        assert len(found) == len(due)
    assert [line["step"] for line in lines(world.nights / "runs" / "day-04", "step")] == [1, 2, 3]
    left = [path for path in world.root.rglob(".*") if path.name not in (".lock", ".metadata") and not path.is_dir()]
    assert not left, left


def test_mistakes_of_a_night_are_one_line(begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(begun).copy(tmp_path / "world")

    def refused(message: str, *words: str, **sections: object) -> None:
        world.configure(**sections)
        assert nightly.main(world.words("day-03", *words)) == 2
        assert message in capsys.readouterr().err

    refused("night day-03: step append is not done; run it first (--steps append)", "--steps", "train")
    refused("held_out: 1.5: must be > 0 and < 1", held_out=1.5)
    refused("increment: output: is set by `hllm nightly`; leave it out", increment={"output": "runs/x"})
    refused("--optim.lrr: unknown option (did you mean 'optim.lr'?)", increment={"optim.lrr": 1})
    refused("train_part: train_and_valid: a night selects", increment={"data.train_part": "train_and_valid"})
    refused("world/none is not a prepared dataset", dataset=str(world.root / "none"))
    refused("day-03.csv: no such mapping file", append={"path": str(world.root / "{night}.csv")})
    refused("day-02.csv: 0 events after", append={"path": str(world.root / "day-02.yaml")})
