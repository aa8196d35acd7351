"""The position bias in training on one and on two ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hllm_torchrec.config.schema import Config
from tests.helpers import task_shop
from tests.helpers.distributed import run_ranks
from tests.helpers.training_fixtures import config, train

PLACES: dict[str, Any] = task_shop.SETTINGS | {
    "data__context": ["device"],
    "objective__tasks": {"click": {}, "like": {}},
    "objective__position_bias": ["place"],
    "optim__lr": 0.05,
    "max_steps": 6,
}


def bias_of(settings: Config) -> dict[str, torch.Tensor]:
    trained = train(settings).hllm.position_bias
    assert trained is not None
    return trained.state_dict()


@pytest.mark.slow
def test_two_ranks_have_one_bias_and_one_level(tmp_path: Path) -> None:
    shop = {"data__dataset": task_shop.dataset().root, **PLACES}
    two = run_ranks(bias_of, 2, config(tmp_path / "two", data__batch_users=2, **shop))
    one = bias_of(config(tmp_path / "one", data__batch_users=4, **shop))
    assert one["mean"].abs().max() > 1e-3 and one["embedding_bags.bias_place.weight"].abs().max() > 0.01
    for name, value in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        torch.testing.assert_close(two[0][name], value, rtol=1e-3, atol=1e-5)
