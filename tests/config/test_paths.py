"""Paths of a run: saved as absolute ones, and found from any folder."""

import os
import shutil
from pathlib import Path

import pytest

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.loading import load_config, save_config
from hllm_torchrec.config.paths import get_value, missing_paths, set_value, with_absolute_paths, with_found_paths
from hllm_torchrec.config.schema import Config
from hllm_torchrec.evaluation.run_loader import run_config

SHAPE = ["--user.shape", "{model_type: llama, hidden_size: 8}"]


def config(*options: str) -> Config:
    user = [] if "--user.pretrained" in options else SHAPE
    return load_config(["--output", "runs/a", "--data.dataset", "data", "--item_llm.shape", SHAPE[1], *user, *options])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data/ and an empty runs/a/, the current one."""
    for folder in ("here/data", "here/runs/a", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def saved(project: Path, config: Config) -> Path:
    save_config(config, project / "runs" / "a" / "config.yaml")
    return project / "runs" / "a"


def test_a_run_saves_absolute_paths_and_leaves_urls(project: Path) -> None:
    found = with_absolute_paths(config("--start_from", "runs/b", "--item_llm.tokenizer", "s3://bucket/words"))
    assert found.output == str(project / "runs/a") and found.data.dataset == str(project / "data")
    assert found.start_from == str(project / "runs/b") and found.item_llm.tokenizer == "s3://bucket/words"
    assert found.user.pretrained is None
    at_url = set_value(config(), "output", "s3://bucket/run")
    assert with_absolute_paths(at_url) == at_url


def test_the_dataset_of_a_run_is_found_from_any_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = saved(project, with_absolute_paths(config()))
    monkeypatch.chdir(project.parent / "elsewhere")
    assert run_config(run).data.dataset == str(project / "data")


def test_relative_paths_are_taken_from_here_or_else_from_above_the_run(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(project, config())
    assert run_config(run).data.dataset == "data"
    monkeypatch.chdir(project.parent / "elsewhere")
    assert run_config(run).data.dataset == str(project / "data")
    assert run_config(Path(os.path.relpath(run))).data.dataset == str(project / "data")
    Path("data").mkdir()
    assert run_config(run).data.dataset == "data"


def test_a_project_may_be_moved_as_a_whole(project: Path) -> None:
    saved(project, with_absolute_paths(config()))
    moved = Path(shutil.move(project, project.parent / "moved"))
    assert run_config(moved / "runs" / "a").data.dataset == str(moved / "data")


def test_what_is_missing_is_named_with_the_file_that_says_so(project: Path) -> None:
    run = saved(project, with_absolute_paths(config("--start_from", "runs/gone", "--user.pretrained", "models/gone")))
    (project / "data").rmdir()
    with pytest.raises(ConfigError) as raised:
        run_config(run)
    assert raised.value.problems == [
        f"{run}/config.yaml: data.dataset: {project}/data: not found from here, nor from the run's folder; name the "
        "directory with --dataset",
        f"{run}/config.yaml: user.pretrained: {project}/models/gone: not found from here, nor from the run's folder; "
        "restore it",
    ]


def test_another_dataset_replaces_that_of_the_run(project: Path) -> None:
    run = saved(project, config("--data.version", "3"))
    other = project.parent / "elsewhere"
    found = run_config(run, other)
    assert (found.data.dataset, found.data.version, run_config(run).data.version) == (str(other), None, 3)
    with pytest.raises(ValueError, match=r"--dataset nowhere: no such directory; name one that `hllm prepare` wrote"):
        run_config(run, Path("nowhere"))


def test_values_are_read_and_replaced_by_their_dotted_names() -> None:
    changed = set_value(config(), "data.dataset", "x")
    assert get_value(changed, "data.dataset") == "x" and get_value(changed, "output") == "runs/a"
    assert missing_paths(changed, Path("c.yaml"))[0].startswith("c.yaml: data.dataset: x: not found")
    assert with_found_paths(changed, Path("runs/a")) == changed
