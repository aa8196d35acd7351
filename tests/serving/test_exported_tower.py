"""The exported tower gives the scorer's logits for any number of users, events and candidates, without this package."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.launch.export_tower import main as export_tower_main
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.serving.batch_scorer import BatchScorer, Request
from hllm_torchrec.serving.exported_tower import (
    INPUTS,
    ExportedTower,
    check_exportable,
    invented_requests,
    tower_inputs,
)
from hllm_torchrec.serving.scorer import Scorer, UserHistory
from tests.helpers import fixtures
from tests.helpers.served_runs import HSTU, settings, trained

SMALL: dict[str, Any] = {"optim__ema": 0.0, "parallel__dense": "ddp"}
SHAPE = {"width": 16, "layers": 2, "heads": 2, "max_positions": 65}
KINDS: dict[str, dict[str, Any]] = {
    "llm": {},
    "sasrec": {"user__encoder": "sasrec", "user__shape": SHAPE},
    "ligr": {"user__encoder": "ligr", "user__shape": SHAPE},
    "bare": {"features__time_depth": 0, "features__action": False, "features__action_gate": False},
    "no users": {"data__user_features": []},
    "no numbers": {"data__numeric_features": []},
    "long": {"data__max_history": 12},
}


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def scorer_of(folder: Path, base: str = "late", **more: Any) -> BatchScorer:
    experiment = build_experiment(settings(base, folder, **(SMALL | more)), init_distributed())
    torch.manual_seed(1)
    for parameter in experiment.hllm.head.parameters():  # at the start the head hardly reads its inputs
        torch.nn.init.normal_(parameter, std=0.3)
    return BatchScorer(experiment)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_program_computes_the_scorers_logits(kind: str, tmp_path: Path) -> None:
    scorer = scorer_of(tmp_path, **KINDS[kind])
    requests = invented_requests(scorer)
    for piece in sorted(fixtures.pieces("test"), key=len)[::7]:
        # Some events are of the request's second or later: it sees a part of the state.
        state = scorer.read(UserHistory(piece.user_id, **piece.columns))
        time = int(piece.timestamps[-1])
        requests.append(Request(state, np.array([0, 1, 3, 17, 39, 5, 2]), time))
    with torch.no_grad():
        found = ExportedTower(scorer).eval()(*tower_inputs(scorer, requests))
    wanted = np.stack(scorer.score_batch(requests))
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5, rtol=0)
    assert wanted.std() > 0.05


Change = Callable[[torch.Tensor], torch.Tensor]
WRONG: list[tuple[str, Change, str]] = [
    ("lengths", lambda x: x + 5, "lengths: each must be 0..64, and at most the events' columns"),
    ("lengths", lambda x: x - 1, "lengths: each must be 0..64"),
    ("times", lambda x: x * 1000, "times: must be seconds UTC, 1970 to 2099"),
    ("times", lambda x: -x, "times: must be seconds UTC, 1970 to 2099"),
    ("times", lambda x: x - 10**8, "timestamps: an event must be before the time of its request"),
    ("timestamps", lambda x: -x, "timestamps: an event must be before the time of its request"),
    ("timestamps", lambda x: x.flip(1), "timestamps: the oldest event must be the first one"),
]


def changed(inputs: tuple[torch.Tensor, ...], **changes: Change) -> tuple[torch.Tensor, ...]:
    """Inputs of the program, some of them changed."""
    return tuple(changes.get(name, lambda x: x)(given) for name, given in zip(INPUTS, inputs, strict=True))


def test_inputs_that_would_give_other_logits_are_refused(tmp_path: Path) -> None:
    scorer = scorer_of(tmp_path)
    inputs, tower = tower_inputs(scorer, invented_requests(scorer)), ExportedTower(scorer).eval()
    for name, change, message in WRONG:
        with torch.no_grad(), pytest.raises(RuntimeError, match=message):
            tower(*changed(inputs, **{name: change}))
    long = {name: lambda x: torch.cat([x, x], 1) for name in ("items", "actions", "timestamps")}
    with torch.no_grad(), pytest.raises(RuntimeError, match="each must be 0..64"):
        tower(*changed(inputs, lengths=lambda x: x + 63, **long))


LOAD = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hllm_torchrec", "transformers", "torchrec", "fbgemm_gpu"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
path, kind = sys.argv[1:3]
inputs = torch.load(sys.argv[3])
if kind == "exported":
    tower = torch.export.load(path).module()
else:
    import torch._inductor
    tower = torch._inductor.aoti_load_package(path)
found = []
with torch.no_grad():
    for given in inputs:
        try:
            found.append(tower(*given))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
torch.save(found, sys.argv[4])
assert not {"hllm_torchrec", "torchrec"} & set(sys.modules)
"""


def loaded_elsewhere(path: Path, kind: str, inputs: list[tuple[torch.Tensor, ...]], folder: Path) -> list[Any]:
    """Results of a written program in a process without this package."""
    torch.save(inputs, folder / "inputs.pt")
    words = [str(path), kind, str(folder / "inputs.pt"), str(folder / "found.pt")]
    checked = os.environ | {"AOTI_RUNTIME_CHECK_INPUTS": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD, *words], cwd=folder, env=checked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: list[Any] = torch.load(folder / "found.pt")
    return found


def wanted_and_inputs(run: Path) -> tuple[list[Any], list[tuple[torch.Tensor, ...]]]:
    """Scores by `Scorer` and inputs, of one user with one event and one candidate, and of several of each."""
    wanted, inputs = [], []
    with BatchScorer.of_run(run, "latest") as scorer, Scorer.of_run(run, "latest") as plain:
        for candidates, some in ((7, slice(None)), (1, slice(1, 2)), (30, slice(2, 4)), (1, slice(0, 2))):
            requests = invented_requests(scorer, candidates)[some]
            inputs.append(tower_inputs(scorer, requests))
            wanted.append(np.stack([plain.score(one.state.history, one.items, one.time) for one in requests]))
    return wanted, inputs


def compare_elsewhere(run: Path, program: Path, kind: str, folder: Path) -> None:
    """Check the logits of a written program, and that it takes no wrong inputs."""
    wanted, inputs = wanted_and_inputs(run)
    wrong = [changed(inputs[0], **{name: change}) for name, change, _ in WRONG]
    shapes = [changed(inputs[0], **{name: lambda x: x[:-1]}) for name in INPUTS[2:-1]]
    if kind == "compiled":  # what it reads by address
        shapes.append(changed(inputs[0], items=lambda x: x.t().contiguous().t()))
    found = loaded_elsewhere(program, kind, [*inputs, *wrong, *shapes], folder)
    for one, other in zip(found, wanted):
        np.testing.assert_allclose(one.numpy(), other, atol=1e-5, rtol=0)
    said = found[len(inputs) :]
    assert all(message in text for text, (*_, message) in zip(said, WRONG))
    assert all(isinstance(text, str) for text in said), said


@pytest.mark.slow
def test_a_written_program_is_loaded_without_this_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = trained("late")
    output = tmp_path / "exports" / "tower.pt2"
    assert export_tower_main(["--run", str(run), "--checkpoint", "latest", "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert float(said.rpartition(" ")[2]) < 1e-5 and f"{output}: model " in said
    compare_elsewhere(run, output, "exported", tmp_path)
    assert [path.name for path in output.parent.iterdir()] == ["tower.pt2"]
    with zipfile.ZipFile(output) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("hllm.json"))
        facts = json.loads(archive.read(name))
    assert facts["inputs"][0] == "users" and facts["max_history"] == 64 and facts["model"] in said


@pytest.mark.long  # a minute of the C++ compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_compiled_package_is_loaded_without_this_package(tmp_path: Path) -> None:
    run, _ = trained("late")
    given = ["--run", str(run), "--checkpoint", "latest", "--output", str(tmp_path / "tower.pt2")]
    assert export_tower_main([*given, "--compiled", str(tmp_path / "compiled.pt2")]) == 0
    compare_elsewhere(run, tmp_path / "compiled.pt2", "compiled", tmp_path)


@pytest.mark.parametrize(
    ("base", "more", "message"),
    [
        ("early", {}, r"objective.fusion: 'early': only with late fusion"),
        ("late", {"user__encoder": "hstu", "user__shape": HSTU}, r"encoder hstu: an exported tower does not"),
        ("late", {"data__history": "positive"}, r"a history of positive events alone: an exported tower does not"),
        (
            "late",
            {"features__tables": {"country": {"kind": "hash", "rows": 100}}},
            r"a table of kind hash: an exported",
        ),
        ("late evidence", {}, r"evidence: an exported tower does not support this: serve the run"),
    ],
)
def test_a_model_with_other_parts_is_refused(base: str, more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        check_exportable(scorer_of(tmp_path, base, **more))


def test_an_output_that_exists_or_has_another_ending_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tower.pt2").write_text("mine")
    for name in ("tower.pt2", "tower.pt"):
        assert export_tower_main(["--run", str(tmp_path), "--output", str(tmp_path / name)]) == 2
        assert "must be the name of a new file that ends in .pt2" in capsys.readouterr().err
    assert (tmp_path / "tower.pt2").read_text() == "mine"


def test_a_package_needs_a_compiler(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cpp_builder  # seconds, which other tests need not wait for

    monkeypatch.setenv("PATH", "")
    cpp_builder.cpp_compiler_search.cache_clear()  # torch keeps the compiler that an earlier test found
    given = ["--run", str(tmp_path), "--output", str(tmp_path / "tower.pt2")]
    assert export_tower_main([*given, "--compiled", str(tmp_path / "compiled.pt2")]) == 2
    assert "--compiled: there is no C++ compiler: install g++" in capsys.readouterr().err
