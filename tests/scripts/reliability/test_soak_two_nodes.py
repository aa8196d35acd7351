"""Two nodes as network namespaces, one of which is cut off: a few cuts; more are the script's own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SKIPPED = 77


def run_script(root: Path, *args: str, seconds: float, **env: str) -> subprocess.CompletedProcess[str]:
    command = [shutil.which("bash") or "bash", str(root / "scripts" / "reliability" / "soak_two_nodes.sh"), *args]
    given = {**os.environ, "PYTHON": sys.executable, **env}
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=seconds)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """What the script needs before it looks for `ip`, and an `id` that says root."""
    for name in ("bash", "dirname", "env"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    write_program(tmp_path / "id", "echo 0")
    return tmp_path


def write_program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_without_ip_it_says_what_to_install(root: Path, programs: Path) -> None:
    result = run_script(root, seconds=20, PATH=str(programs))
    assert (result.returncode, result.stdout) == (SKIPPED, "")
    assert result.stderr == "soak_two_nodes: skipped: there is no `ip` here: apt-get install iproute2\n"


def test_where_namespaces_are_refused_it_is_skipped_in_one_line(root: Path, programs: Path) -> None:
    write_program(programs / "ip", "echo 'mount --make-shared /run/netns failed: Operation not permitted' >&2; exit 1")
    result = run_script(root, seconds=20, PATH=str(programs))
    assert result.returncode == SKIPPED
    assert result.stderr == (
        "soak_two_nodes: skipped: network namespaces are refused here: mount --make-shared /run/netns failed: "
        "Operation not permitted\n"
    )


def test_only_root_may(root: Path, programs: Path) -> None:
    write_program(programs / "id", "echo 1000")
    result = run_script(root, seconds=20, PATH=str(programs))
    assert result.returncode == SKIPPED
    assert result.stderr == "soak_two_nodes: skipped: network namespaces need root\n"


@pytest.mark.long
def test_a_node_that_is_cut_off_and_rejoins_loses_nothing(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    result = run_script(root, "--cuts=2", "--steps=40", "--timeout=8", "--out", str(out), seconds=600)
    if result.returncode == SKIPPED:
        pytest.skip(result.stderr)
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(out.read_text())
    assert found["recovered"] == 2 and found["lost"] == 0 and found["tracebacks"] == 0
    assert min(found["lines_that_name_rank_and_step"].values()) >= 1
    assert found["starts"]["training"] == 2  # the short cut began nothing anew
