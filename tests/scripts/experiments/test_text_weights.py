"""The table of weights and decays repeats what the run itself was evaluated with."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hllm_torchrec.common.run_log import read_log
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from tests.helpers import fixtures
from tests.helpers.scripts import bench_module
from tests.helpers.training_fixtures import config, train


@pytest.mark.parametrize("more", [{}, {"objective__transitions": 0.4, "item_llm__trainable": False}], ids=str)
def test_the_cell_of_the_runs_own_weight_is_its_validation_figure(
    more: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = bench_module("text_weights")
    stages = [{"name": "cached", "epochs": 1, "item_embeddings": "cached"}]
    options = {
        "data__dataset": fixtures.dataset("leave_one_out").root,
        "data__user_features": [],
        "data__numeric_features": [],
        "item_llm__whiten": True,
        "objective__fusion": "none",
        "objective__item_space": "features",
        "objective__positive_targets_only": False,
        "objective__text_similarity": 0.6,
        **more,
        "evaluation__ks": [10],
        "stages": stages,
    }
    train(config(tmp_path / "run", **options))
    (measured,) = [line["ndcg@10"] for line in read_log(tmp_path / "run") if line["event"] == "eval"]
    script.tabulate(tmp_path / "run", init_distributed())
    destroy_distributed()
    said = capsys.readouterr().out.splitlines()
    weights = next(line for line in said if line.startswith("| decay")).split(" | ")
    cells = next(line for line in said if line.startswith("| 0.7")).split(" | ")
    if more:
        header = next(line for line in said if line.startswith("| learned")).split(" | ")
        both = said[said.index(" | ".join(header)) :]
        both = next(line for line in both if line.startswith("| texts 0.6")).split(" | ")
        assert float(both[header.index("0.4")]) == pytest.approx(measured, abs=1e-4)
        assert float(both[1]) == pytest.approx(float(cells[weights.index("0.6")]), abs=1e-4)
    else:
        assert float(cells[weights.index("0.6")]) == pytest.approx(measured, abs=1e-4)
    alone = next(line for line in said if "shrinkage 0.1:" in line)
    assert float(alone.rpartition(" ")[2]) == pytest.approx(float(cells[-1].strip(" |")), abs=1e-4)


def test_equal_scores_count_as_in_a_loop() -> None:
    script = bench_module("text_weights")
    score = torch.tensor([[9.0, 1.0, 2.0, 3.0], [9.0, 5.0, 4.0, 4.5]])
    part = script.Targets(
        torch.empty(0), torch.empty(0), torch.empty(0), torch.empty(0),
        torch.tensor([1, 2]), (torch.tensor([3, 1, 3]), torch.tensor([0, 1, 3])),
    )  # fmt: skip
    # First user: item 2 alone is better, item 3 was seen; second user: all better ones were seen.
    assert script.ndcg([part], lambda _: score) == pytest.approx((1 / torch.tensor(3.0).log2().item() + 1) / 2)
