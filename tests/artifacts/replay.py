"""Everything that is done with a copy of the artifacts, in one process: libraries are imported once.

    PYTHONPATH=. python tests/artifacts/replay.py SAVED SCRATCH

SCRATCH, an empty folder, gets the copy and `found.json`: job -> {"found": ...} or {"error": traceback}.
"""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.artifacts import jobs
from tests.artifacts.numerics import probe, versions


def replay(recorded: dict[str, Any]) -> dict[str, Any]:
    """Results of all jobs on the copy in the present folder; recorded: `recorded.json`."""
    results: dict[str, Any] = {}

    def attempt(name: str, action: Callable[[], Any]) -> None:
        try:
            results[name] = {"found": action()}
        except Exception:  # the other jobs are still to be done; the job's test shows this
            results[name] = {"error": traceback.format_exc()}

    kinds = sorted(recorded["runs"], key=lambda kind: kind == "late")  # last: `stored` begins with what it holds
    ranking = [kind for kind in recorded["runs"] if Path("trained", kind, "predictions").is_dir()]
    attempt("numerics", lambda: {"probe": probe(), "packages": versions()})
    attempt("prepare in place", lambda: jobs.prepare(Path("dataset")) and jobs.digests(Path("dataset")))
    attempt("prepare again", lambda: jobs.prepare(Path("again")) and None)
    attempt("compare", lambda: jobs.compare(Path("measured"), ranking) or jobs.metrics(Path("measured")))
    for kind in kinds:
        run = Path("trained", kind)
        attempt(f"configuration {kind}", lambda run=run: jobs.configuration(run))
        attempt(f"evaluate {kind}", lambda run=run: _evaluate(run))
    for store in recorded["stores"]:
        attempt(f"read {store}", lambda store=store: jobs.vectors(Path("stores", store), Path("exported", store)))
    attempt("embed in place", lambda: _embed_in_place(Path("stores")))
    attempt("embed again", lambda: _embed_again(Path("again-stores"), recorded["stores"]))
    for kind in kinds:
        step = recorded["runs"][kind]["kept_step"]
        attempt(f"resume {kind}", lambda run=Path("trained", kind), step=step: _resume(run, step))
    results["files of the dataset"] = {"found": jobs.digests(Path("dataset"))}
    return results


def _evaluate(run: Path) -> dict[str, Any]:
    for kind in ("predictions", "retrieval"):
        shutil.rmtree(run / kind, ignore_errors=True)
    (run / f"metrics-{jobs.SPLIT}.json").unlink()
    jobs.evaluate(run)
    return {"scores": jobs.scores(run), "metrics": jobs.metrics(run)}


def _embed_in_place(stores: Path) -> dict[str, str]:
    jobs.embed(Path("trained/late"), stores)
    return jobs.digests(stores)


def _embed_again(stores: Path, names: dict[str, Any]) -> dict[str, Any]:
    jobs.embed(Path("trained/late"), stores)
    return {name: jobs.vectors(stores / name, Path("exported-again", name)) for name in names}


def _resume(run: Path, step: int) -> dict[str, Any]:
    jobs.resume(run)
    return {**jobs.steps(run, after=step), "last_evaluation": jobs.last_evaluation(run)}


if __name__ == "__main__":
    saved, scratch = (Path(argument).resolve() for argument in sys.argv[1:])
    shutil.copytree(saved, scratch, dirs_exist_ok=True)
    os.chdir(scratch)
    recorded = json.loads(Path("recorded.json").read_text())
    for kind in recorded["runs"]:
        jobs.unpack(Path("trained", kind, "checkpoints"))
    Path("found.json").write_text(json.dumps(replay(recorded)))
