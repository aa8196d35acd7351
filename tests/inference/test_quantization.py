"""Tables in int8 and float16 for serving: rows within their rounding, scores close, bytes as said."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec import KeyedJaggedTensor

from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.scoring import score_split
from hllm_torchrec.inference.quantization import quantize_collection, quantize_items, quantize_tables, table_bytes
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.modules.features.frozen_items import FROZEN_ITEMS
from hllm_torchrec.serving.scorer import Scorer, UserHistory
from tests.helpers import fixtures
from tests.helpers.training_fixtures import config

HALF_STEP = 0.5 / 255
"""Of a row's range; float16 scales and biases add a rounding of 2^-11 of what they are."""


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def bags(ids: torch.Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=["a", "b"], values=ids.repeat(2), lengths=torch.ones(2 * ids.numel(), dtype=torch.int64)
    )


def test_rows_are_within_the_bound_of_row_wise_quantisation() -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(40, 16) * torch.logspace(-3, 1, 40)[:, None], "b": torch.randn(40, 8)}
    found = quantize_collection(weights, {"a": torch.qint8, "b": torch.float32})
    rows = found(bags(torch.arange(40))).to_dict()
    low, high = weights["a"].amin(1, keepdim=True), weights["a"].amax(1, keepdim=True)
    allowed = (high - low) * HALF_STEP + (low.abs() + (high - low)) * 2**-11 + 1e-7
    error = (rows["a"] - weights["a"]).abs()
    assert (error <= allowed).all() and error.max() > 0
    assert torch.equal(rows["b"], weights["b"])
    sums = found(
        KeyedJaggedTensor(keys=["a", "b"], values=torch.tensor([3, 7, 1]), lengths=torch.tensor([2, 1]))
    ).to_dict()
    torch.testing.assert_close(sums["a"][0], rows["a"][3] + rows["a"][7])


@pytest.mark.parametrize(("dtype", "share", "closeness"), [("int8", 0.5, 0.05), ("fp16", 0.51, 0.005)])
def test_a_scorer_of_quantised_tables_scores_nearly_alike(
    tmp_path: Path, dtype: str, share: float, closeness: float
) -> None:
    settings = config(tmp_path, features__init_scale=0.3, user__shape={**_WIDE}, features__time_width=32)
    plain = Scorer(build_experiment(settings, init_distributed()))
    small = Scorer(build_experiment(settings, init_distributed()), table_dtype=dtype)
    piece = max(fixtures.pieces("test"), key=lambda piece: piece.item_ids.size)
    past = UserHistory(
        piece.user_id, *(c[:20] for c in (piece.item_ids, piece.timestamps, piece.labels, piece.actions))
    )
    time, items = int(piece.timestamps[20]) + 1, np.arange(plain.experiment.dataset.num_items)
    expected, found = (scorer.score(past, items, time) for scorer in (plain, small))
    difference = np.abs(found - expected).max()
    assert 0 < difference < closeness * expected.std() + closeness / 10, (difference, expected.std())
    tables = small.hllm.features.tables
    by_name = table_bytes(tables)
    assert by_name["item_id"] <= share * 4 * plain.experiment.dataset.num_items * 64
    assert by_name["time_month"] == 4 * 13 * 32  # below shard_from_rows: as it was


_WIDE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 3,
}


def test_a_split_can_be_scored_with_quantised_tables_and_items(tmp_path: Path) -> None:
    experiment = build_experiment(config(tmp_path, features__init_scale=0.3), init_distributed())
    loader = experiment.loader("valid", 4)
    experiment.use_cached_items()
    exact = score_split(experiment, loader)
    tables, items = quantize_tables(experiment), quantize_items(experiment)
    small = score_split(experiment, loader)
    assert tables.before["item_id"] == 4 * experiment.dataset.num_items * 24
    assert tables.after["item_id"] < tables.before["item_id"]
    assert items.after[FROZEN_ITEMS] < items.before[FROZEN_ITEMS] == 4 * experiment.dataset.num_items * 16
    assert 0 < np.abs(small["score"] - exact["score"]).max() < 0.05


def test_an_unknown_type_is_refused(tmp_path: Path) -> None:
    experiment = build_experiment(config(tmp_path), init_distributed())
    with pytest.raises(
        ValueError, match=r"table_dtype: 'int9': unknown \(did you mean 'int8'\?\); choose one of int8, fp16"
    ):
        Scorer(experiment, table_dtype="int9")
    with pytest.raises(ValueError, match="table_dtype: 'q': unknown; choose"):
        quantize_tables(experiment, "q")
