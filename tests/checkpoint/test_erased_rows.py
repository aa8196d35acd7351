"""Erased rows: 0 in weights, optimizer state and averages of any plan; all other bits of a checkpoint stay."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from hllm_torchrec.checkpoint.erased_rows import erase_rows
from hllm_torchrec.checkpoint.layout import find_damage, read_marker
from hllm_torchrec.checkpoint.load import load_checkpoint, save_checkpoint
from hllm_torchrec.checkpoint.safe_reader import SafeReader
from tests.checkpoint.test_growth import TABLE, Training
from tests.helpers.distributed import run_ranks
from tests.helpers.small_models import ROWS


def tensors(path: Path) -> dict[str, Tensor]:
    saved = SafeReader(path).read_tensors()
    state: dict[str, Any] = {key: torch.zeros(one.size, dtype=one.properties.dtype) for key, one in saved.items()}
    dcp.load(state, storage_reader=SafeReader(path), no_dist=True)  # type: ignore[no-untyped-call]
    return state


def test_rows_of_weights_moments_and_averages_become_zero_and_the_rest_stays(tmp_path: Path) -> None:
    name = TABLE.format("t")
    table = torch.arange(12.0).view(4, 3) + 1
    state = {
        "model": {name: table, TABLE.format("other"): table.clone(), "layer": torch.ones(4)},
        "dense": {name: {"exp_avg": table + 0.1, "step": torch.tensor(3.0)}},
        "tables": {name: {"t.momentum1": torch.arange(8.0) + 1}},  # of two column shards
        "ema": {name: table + 0.3},
    }
    extra = {"factors": "old", "other": 1, "evidence": None}
    path = save_checkpoint(tmp_path, 7, state, extra, metric=0.5, keep_best="max")
    before, marker = tensors(path), read_marker(path)
    again = {"factors": "new", "evidence": "not this run's"}
    assert erase_rows(path, "t", np.array([2, 99]), again, dry_run=True) == 2 and tensors(path).keys() == before.keys()
    assert all(torch.equal(tensors(path)[key], value) for key, value in before.items())
    assert erase_rows(path, "t", np.array([2, 99]), again) == 2  # a row and a value
    after = tensors(path)
    for key, value in before.items():
        due = value.clone()
        if ".t." in key and value.ndim == 2:
            due[2] = 0
        elif key.endswith("momentum1"):
            due[[2, 6]] = 0
        assert torch.equal(after[key], due), key
    assert find_damage(path) is None and read_marker(path)["metric"] == marker["metric"]
    assert load_checkpoint(path, {"model": state["model"]})["factors"] == "new"
    assert torch.equal(table[2], torch.zeros(3)) and list(tmp_path.iterdir()) == [path]
    assert erase_rows(path, "t", np.array([2]), again) == 0 == erase_rows(path, "none", np.array([1]))


def save_sharded(folder: str, plan: str) -> None:
    training = Training(plan, ROWS)
    training.run(2)
    save_checkpoint(Path(folder), 1, training.state(), {})


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["table_wise", "column_wise"])
def test_sharded_tables_of_two_ranks(tmp_path: Path, plan: str) -> None:
    run_ranks(save_sharded, 2, str(tmp_path), plan)
    path = next(tmp_path.glob("step-*"))
    before = tensors(path)
    row = int(before[f"model.{TABLE.format('t0')}"].any(1).nonzero().flatten()[-1])
    assert erase_rows(path, "t0", np.array([row])) == (2 if plan == "column_wise" else 1)  # by stored piece
    for key, value in tensors(path).items():
        rows = torch.arange(len(value)) % ROWS[0] == row if ".t0." in key and value.ndim else torch.zeros(1, dtype=bool)
        assert not value[rows].any() if rows.any() else torch.equal(value, before[key])
        assert not rows.any() or torch.equal(value[~rows], before[key][~rows])
    assert read_marker(path)["world_size"] == 2 and find_damage(path) is None


def test_a_damaged_checkpoint_is_not_rewritten(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": {TABLE.format("t"): torch.ones(4, 3)}}, {})
    file = next(path.glob("__*"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is truncated: .*; remove it"):
        erase_rows(path, "t", np.array([1]))
