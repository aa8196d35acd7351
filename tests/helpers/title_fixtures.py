"""A run of two steps that writes texts, its users' vectors and clusters, and its titles."""

import shutil
from functools import cache
from pathlib import Path

from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.launch import cli
from tests.helpers import creative_fixtures, fixtures
from tests.helpers.training_fixtures import config, train


@cache
def world() -> Path:
    """A folder with `run`, `users`, `clusters` (three) and `titles` (two clusters of each item); leave them as they
    are."""
    root = fixtures.folder() / "titles"
    train(config(root / "run", **creative_fixtures.settings(max_steps=2)))
    destroy_distributed()
    done(["embed", "--run", str(root / "run"), "--users", str(root / "users")])
    done(
        [
            "cluster",
            "--users",
            str(root / "users"),
            "--output",
            str(root / "clusters"),
            "--clusters",
            "3",
            "--least",
            "2",
        ]
    )
    done(create(root / "titles", "--top", "2"))
    return root


def create(output: Path, *given: str, clusters: str = "clusters") -> list[str]:
    """Command line of `hllm create` without filters, which the texts of a run of two steps do not pass."""
    root = fixtures.folder() / "titles"
    named = ["--run", str(root / "run"), "--clusters", str(root / clusters), "--output", str(output)]
    return ["create", *named, "--no-filters", *given]


def done(line: list[str]) -> None:
    """Run a command, which must succeed."""
    assert cli.main(line) == 0, line
    destroy_distributed()


def copied(name: str, target: Path) -> Path:
    """A copy of a folder of `world`, to be changed."""
    shutil.copytree(world() / name, target / name)
    return target / name
