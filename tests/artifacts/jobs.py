"""Jobs on a copy of `saved/`, the present folder, by their documented command lines; and what they left behind.

Only files and commands are used, which users have too: modules may move and functions change their names.
"""

import contextlib
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hllm_torchrec.launch.cli import main

SPLIT = "valid"


def job(*arguments: str | Path) -> str:
    """Run `hllm ARGUMENTS`; returns what it printed.

    Raises:
        RuntimeError: the exit status is not 0; has what was printed.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            status = int(leaving.code or 0)
    if status:
        raise RuntimeError(f"hllm {' '.join(map(str, arguments))}: exit status {status}\n{said.getvalue()}")
    return said.getvalue()


def evaluate(run: Path) -> None:
    """Score the run's newest checkpoint: predictions/ (or retrieval/), metrics-valid.json."""
    job("evaluate", "--run-dir", run, "--checkpoint", "latest", "--split", SPLIT, "--draws", "20", "--no-tensorboard")


def compare(folder: Path, runs: Iterable[str]) -> None:
    """Measure and compare the predictions that these runs hold; metrics-valid.json goes to `folder`."""
    named = [f"{run}=trained/{run}" for run in runs]
    job("evaluate", "--predictions", *named, "--split", SPLIT, "--draws", "20", "--no-tensorboard", "--output", folder)


def embed(run: Path, stores: Path) -> None:
    """Bring the stores of items and of users up to date with the run's newest checkpoint."""
    places = ("--items", stores / "items", "--users", stores / "users")
    job("embed", "--run", run, "--checkpoint", "latest", *places)


def resume(run: Path) -> None:
    """Train on to the end."""
    job("train", "--config", run / "config.yaml", "--resume", "true")


def prepare(target: Path) -> str:
    """Prepare the dataset."""
    return job("prepare", "--source", "table", "--path", "source/mapping.yaml", "--output", target)


def steps(run: Path, after: int = 0) -> dict[str, list[str]]:
    """`float.hex()` of the loss and the gradient norm of each step after one."""
    lines = [line for line in read_log(run) if line["event"] == "step" and line["step"] > after]
    return {name: [float(line[name]).hex() for line in lines] for name in ("loss", "grad_norm")}


def last_evaluation(run: Path) -> dict[str, Any]:
    """Metrics of the run's last evaluation during training, floats as text of `float.hex()`."""
    (*_, line) = [line for line in read_log(run) if line["event"] == "eval"]
    return {k: v.hex() if isinstance(v, float) else v for k, v in line.items() if k not in ("event", "time")}


def scores(run: Path) -> dict[str, dict[str, list[Any]]]:
    """Columns of the rows that the evaluation of a run has written: predictions, and ranks in the catalogue."""
    import pyarrow.parquet as pq

    folders = {kind: run / kind / SPLIT for kind in ("predictions", "retrieval")}
    return {kind: pq.read_table(folder).to_pydict() for kind, folder in folders.items() if folder.is_dir()}


def metrics(folder: Path) -> dict[str, Any]:
    """metrics-valid.json, but for what names the machine and files, and for sentences to people."""
    found = json.loads((folder / f"metrics-{SPLIT}.json").read_text())
    del found["cautions"]
    origin = found.pop("provenance")
    return found | {name: origin[name] for name in ("weights", "dataset", "step", "seed") if name in origin}


def configuration(run: Path) -> dict[str, Any]:
    """The run's configuration as this version resolves it."""
    import yaml

    return dict(yaml.safe_load(job("train", "--config", run / "config.yaml", "--print_config")))


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def vectors(store: Path, scratch: Path) -> dict[str, Any]:
    """Key -> `float.hex()` of the numbers of its vector, as exported, in the order of the keys."""
    import pyarrow.parquet as pq

    job("store", "export", store, "--parquet", scratch)
    table = pq.read_table(scratch).sort_by("id")
    rows = zip(table["id"].to_pylist(), table["embedding"].to_pylist(), strict=True)
    return {str(key): [float(number).hex() for number in row] for key, row in rows}


def digests(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pack(checkpoints: Path) -> None:
    """Replace a run's checkpoints by an archive beside them, a quarter of their size."""
    with tarfile.open(checkpoints.with_suffix(".tar.xz"), "w:xz") as archive:
        archive.add(checkpoints, checkpoints.name, filter=_anonymous)
    shutil.rmtree(checkpoints)


def unpack(checkpoints: Path) -> None:
    """What `pack` has packed."""
    with tarfile.open(checkpoints.with_suffix(".tar.xz")) as archive:
        archive.extractall(checkpoints.parent, filter="data")


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member
