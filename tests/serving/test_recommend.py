"""Recommendations are the run's own scores of the whole catalogue, seen items left out."""

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.forgetting import Names, forget
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.catalogue_retrieval import evaluate_retrieval
from hllm_torchrec.evaluation.run_loader import load_run
from hllm_torchrec.inference.item_index import ItemIndex, export_item_index
from hllm_torchrec.launch import recommend as command
from hllm_torchrec.serving.recommend import history_before, recommend
from hllm_torchrec.serving.scorer import Scorer
from tests.data.test_withdrawn_items import GONE, withdraw
from tests.helpers import fixtures
from tests.helpers.training_fixtures import config, train

LATER = 1_500_000_000
"""A second after all events."""


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


@cache
def trained(fusion: str) -> Path:
    run = fixtures.folder() / "recommends" / fusion
    rule = "leave_one_out" if fusion == "none" else "time"
    train(
        config(
            run,
            data__dataset=fixtures.dataset(rule).root,
            objective__fusion=fusion,
            objective__positive_targets_only=False,
            features__init_scale=0.3,
            data__user_features=[],
            data__numeric_features=[],
        )
    )
    destroy_distributed()
    return run


def test_a_ranking_model_recommends_by_its_scores() -> None:
    found = recommend(trained("early"), "u7", 5, init_distributed(), time=LATER)
    history = history_before(fixtures.dataset(), "u7", LATER)
    with Scorer.of_run(trained("early"), "best", init_distributed()) as scorer:
        logits = scorer.score(history, np.arange(1, fixtures.ITEMS + 1), LATER)
    raw = fixtures.dataset().items["raw_item_id"].to_pylist()
    assert [item.raw_id for item in found.history] == [raw[item - 1] for item in history.item_ids.tolist()]
    seen = {item.raw_id for item in found.history}
    best = [raw[item] for item in np.argsort(-logits, kind="stable").tolist() if raw[item] not in seen]
    assert [item.raw_id for item in found.items] == best[:5] and found.scored_by == "probability"


@pytest.mark.slow
def test_a_generative_model_puts_targets_where_evaluation_ranks_them(tmp_path: Path) -> None:
    run, dataset = trained("none"), fixtures.dataset("leave_one_out")
    loaded = load_run(run, "best", init_distributed())
    loaded.experiment.model.eval()
    with loaded.weights, torch.no_grad():
        evaluate_retrieval(loaded.experiment, loaded.experiment.loader("test", 8), ranks_folder=tmp_path / "ranks")
    for row in pq.read_table(tmp_path / "ranks").to_pylist():
        raw_user = dataset.users["raw_user_id"][row["user_id"] - 1].as_py()
        times = history_before(dataset, raw_user, LATER).timestamps
        if times[-2] < times[-1]:  # a request at the last event's second sees all events before it
            break
    raw_item, moment = dataset.items["raw_item_id"][row["item_id"] - 1].as_py(), int(times[-1])
    found = recommend(run, raw_user, fixtures.ITEMS, init_distributed(), time=moment)
    assert [item.raw_id for item in found.items].index(raw_item) + 1 == row["rank"]


def test_mistakes_are_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    run = str(trained("early"))
    assert command.main(["--run", run, "--user", "U7"]) == 2
    assert "user 'U7': not in" in (message := capsys.readouterr().err) and "did you mean 'u7'" in message
    assert command.main(["--run", run, "--user", "u7", "--time", "5"]) == 2
    assert "user 'u7': no event before 5" in capsys.readouterr().err
    assert command.main(["--run", run, "--user", "u7", "--time", "1700000000000"]) == 2
    assert "'1700000000000' is beyond 2099 in its unit; it looks like milliseconds; give" in capsys.readouterr().err
    assert command.main(["--run", run, "--user", "u7", "--top", "0"]) == 2
    assert "top is 0: must be at least 1" in capsys.readouterr().err


def test_a_forgotten_user_is_not_known(tmp_path: Path) -> None:
    root = Path(shutil.copytree(fixtures.dataset().root, tmp_path / "shop"))
    forget(root, Names(["u7"]))
    with pytest.raises(ValueError, match=r"user 'u7': not in .*; it has \d+ users"):
        history_before(Dataset.open(root), "u7", LATER)


def test_the_command_prints_history_and_items(capsys: pytest.CaptureFixture[str]) -> None:
    run = trained("early")
    capsys.readouterr()  # of the training, where this test is the first that needs it
    assert command.main(["--run", str(run), "--user", "u7", "--top", "3", "--history", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("user u7, ") and printed[0].endswith("the latest 2:")
    assert printed[3] == "recommended, with probability:" and len(printed) == 7


@pytest.mark.slow
def test_withdrawn_items_are_no_candidates(tmp_path: Path) -> None:
    roots = {rule: shutil.copytree(fixtures.dataset(rule).root, tmp_path / rule) for rule in ("time", "leave_one_out")}
    gone = {withdraw(root, tmp_path / f"{rule}-shop").items["raw_item_id"][number - 1].as_py()
            for rule, root in roots.items() for number in GONE}  # fmt: skip
    for fusion, rule in (("early", "time"), ("none", "leave_one_out")):
        options = {"time": LATER, "include_seen": True}
        whole = recommend(trained(fusion), "u7", 99, init_distributed(), **options)
        fewer = recommend(trained(fusion), "u7", 99, init_distributed(), dataset=roots[rule], **options)
        left = [item.raw_id for item in whole.items if item.raw_id not in gone]
        assert [item.raw_id for item in fewer.items] == left and len(left) == len(whole.items) - len(GONE)
    loaded = load_run(trained("none"), "best", init_distributed(), dataset=roots["leave_one_out"])
    with loaded.weights:
        found = evaluate_retrieval(loaded.experiment, loaded.experiment.loader("test", 8))
    assert found["candidates"] == fixtures.ITEMS - len(GONE)
    count = export_item_index(trained("none"), tmp_path / "index", "best", init_distributed(), dataset=roots[rule])
    assert count == fixtures.ITEMS - len(GONE) and not gone & set(ItemIndex.open(tmp_path / "index").ids.to_pylist())
