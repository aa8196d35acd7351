"""What each job imports: seconds of every start, and nothing that it does not need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from hllm_torchrec.store import EmbeddingStore
from tests.helpers import fixtures
from tests.helpers.prediction_rows import columns, write_parquet
from tests.helpers.training_fixtures import config, train

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ["torch", "torchrec", "torch._dynamo", "transformers", "peft", "sklearn", "scipy", "torchx"]
"""Without pandas: Arrow imports it where it is installed, as it is for the tests."""
OWN_MODEL = {"encoder": "hstu", "shape": {"width": 16, "layers": 1, "heads": 2}}
SAYS_WHAT_IT_HAS = """
import contextlib, importlib, io, json, sys
found = []
for module, arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()):
        job = importlib.import_module(module)
        assert not arguments or job.main(arguments) == 0
    found.append([name for name in json.loads(sys.argv[2]) if name in sys.modules])
print(json.dumps(found))
"""


def imported(*jobs: tuple[str, list[str]]) -> list[set[str]]:
    """Which of `HEAVY` one process has after each of the jobs, run in order; a module without arguments is imported."""
    run = subprocess.run(
        [sys.executable, "-c", SAYS_WHAT_IT_HAS, json.dumps(jobs), json.dumps(HEAVY)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    return [set(names) for names in json.loads(run.stdout.splitlines()[-1])]


def test_jobs_import_no_more_than_they_need(tmp_path: Path) -> None:
    store = EmbeddingStore.create(tmp_path / "store", 3, "fp16")
    with store.writer() as writer:
        writer.upsert(["a", "b"], torch.eye(3)[:2])
        writer.commit()
    rows = {name: values for name, values in columns().items() if name in ("label", "score", "user_id")}
    files = write_parquet(rows, tmp_path / "rows")
    # Each has all that those before it have.
    help_, info, evaluated = imported(
        ("hllm_torchrec.launch.cli", []),
        ("hllm_torchrec.launch.store", ["info", str(store.root)]),
        ("hllm_torchrec.launch.evaluate", ["--predictions", f"new={files}", "--draws", "0", "--no-tensorboard"]),
    )
    assert help_ == set()
    assert info == {"torch"}
    assert evaluated == {"torch"}


def test_a_run_without_an_llm_is_served_and_trained_without_transformers(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(
        config(
            run,
            item_llm={"enabled": False},
            user=OWN_MODEL,
            data__user_features=[],
            data__numeric_features=[],
            stages=[{"name": "only", "epochs": 0.1}],
        )
    )
    user = str(np.asarray(fixtures.dataset().users["raw_user_id"])[0])
    recommended, trainer = imported(
        ("hllm_torchrec.launch.recommend", ["--run", str(run), "--user", user, "--time", "1500000000"]),
        ("hllm_torchrec.training.trainer", []),
    )
    # torchrec imports tensordict, and that torch._dynamo
    assert recommended == trainer == {"torch", "torchrec", "torch._dynamo"}
