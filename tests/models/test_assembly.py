"""An experiment starts from the same model wherever it runs, and refuses what does not fit its dataset."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardedTensor

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.dataset import Dataset, FileGroup, RowGroup, base_rate
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.distributed.wrappers import full_tensor
from hllm_torchrec.embedding.tables import INIT_ROWS, initialize_tables
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.item_encoder import length_sorted_chunks
from hllm_torchrec.models.item_source import CachedItems
from tests.helpers import fixtures
from tests.helpers.distributed import run_ranks
from tests.helpers.small_models import TwoTables, shard
from tests.helpers.training_fixtures import USER_LLAMA, config

ROWS = (INIT_ROWS + 900, 11)  # a table of more than one block, and a small one


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def build(settings: Config) -> Experiment:
    return build_experiment(settings, init_distributed())


# --- tables ----------------------------------------------------------------------------------------------


def initialised(sharding: str, seed: int = 3, scale: float = 0.5) -> dict[str, list[tuple[int, int, Tensor]]]:
    """This rank's parts of both tables: (first row, first column, values)."""
    init_distributed()
    model = shard(TwoTables(ROWS), sharding)
    initialize_tables(model, seed, scale)
    return {table: _parts(model, table) for table in ("t0", "t1")}


def _parts(model: DistributedModelParallel, table: str) -> list[tuple[int, int, Tensor]]:
    value = model.state_dict()[f"ebc.embedding_bags.{table}.weight"]
    if not isinstance(value, ShardedTensor):
        return [(0, 0, value.detach().clone())]
    return [(*s.metadata.shard_offsets, s.tensor.detach().clone()) for s in value.local_shards()]


def assembled(ranks: list[dict[str, list[tuple[int, int, Tensor]]]], table: str) -> Tensor:
    rows = ROWS[int(table[1])]
    full = torch.full((rows, 8), float("nan"))
    for parts in ranks:
        for row, column, values in parts[table]:
            full[row : row + values.shape[0], column : column + values.shape[1]] = values
    assert not full.isnan().any()
    return full


@pytest.mark.slow
@pytest.mark.parametrize("table", ["t0", "t1"])
def test_tables_start_equal_under_every_plan_and_world_size(table: str) -> None:
    reference = assembled([initialised("table_wise")], table)
    destroy_distributed()
    plans = {
        "column-wise on one rank": [initialised("column_wise")],
        "replicated on one rank": [initialised("data_parallel")],
        "table-wise on two": run_ranks(initialised, 2, "table_wise"),
        "column-wise on two": run_ranks(initialised, 2, "column_wise"),
        "replicated on two": run_ranks(initialised, 2, "data_parallel"),
    }
    for name, ranks in plans.items():
        assert torch.equal(assembled(ranks, table), reference), name


def test_table_entries_are_uniform_and_differ_between_rows_tables_and_seeds() -> None:
    ranks = [initialised("table_wise")]
    big, small = assembled(ranks, "t0"), assembled(ranks, "t1")
    assert big.abs().max() <= 0.5 and big.abs().mean() == pytest.approx(0.25, abs=0.01)
    assert torch.unique(big, dim=0).shape[0] == ROWS[0]
    assert not torch.equal(big[: ROWS[1]], small)
    assert not torch.equal(big[:INIT_ROWS][:900], big[INIT_ROWS:])
    assert not torch.equal(assembled([initialised("table_wise", seed=4)], "t0"), big)
    assert torch.equal(assembled([initialised("table_wise", scale=0.25)], "t0"), big / 2)


@pytest.mark.slow
@pytest.mark.parametrize("dense", ["ddp", "fsdp"])
def test_one_and_two_ranks_start_from_the_same_model(dense: str, tmp_path: Path) -> None:
    settings = config(tmp_path, parallel__dense=dense, objective__generative_weight=1, seed=5)
    one = dense_weights(settings)
    for found in run_ranks(dense_weights, 2, settings):
        assert found.keys() == one.keys()
        assert not [name for name in one if not torch.equal(found[name], one[name])]
    destroy_distributed()
    other = dense_weights(replace(settings, seed=6))
    assert not torch.equal(
        other["user.backbone.layers.0.mlp.up_proj.weight"], one["user.backbone.layers.0.mlp.up_proj.weight"]
    )


def dense_weights(settings: Config) -> dict[str, Tensor]:
    hllm = build(settings).hllm
    return {n: full_tensor(p.detach()).clone() for n, p in hllm.named_parameters() if ".embedding_bags." not in n}


def test_ranks_draw_different_dropout() -> None:
    first, second = run_ranks(draw, 2, config(Path("unused")))
    assert first != second


def draw(settings: Config) -> list[float]:
    build(settings)
    return torch.rand(3).tolist()


# --- base rate -------------------------------------------------------------------------------------------


class _Labels(Dataset):
    """A dataset of nothing but training labels."""

    def __init__(self, groups: list[list[list[float | None]]]) -> None:
        super().__init__(Path("nowhere"), {})
        self.groups = groups

    def row_groups(self, part: str, since: int | None = None) -> list[RowGroup]:
        assert part == "train"
        return [FileGroup(Path(str(i)), 0, len(rows)) for i, rows in enumerate(self.groups)]

    def read_row_group(self, path: Path, index: int, columns: Any = None) -> pa.Table:  # type: ignore[override]
        return pa.table({"labels": pa.array(self.groups[int(str(path))], pa.list_(pa.float32()))})


@pytest.mark.parametrize(
    ("groups", "rate"),
    [
        ([[[1.0, 0.0, None], []], [[0.0, 0.0]]], 0.25),
        ([[[1.0, 1.0]]], 0.5),  # one class says nothing about the odds
        ([[[0.0]]], 0.5),
        ([[[None], []]], 0.5),
    ],
)
def test_base_rate_is_the_share_of_positives_among_exposures(groups: list[Any], rate: float) -> None:
    assert base_rate(_Labels(groups)) == rate


def test_base_rate_of_the_shop() -> None:
    labels = np.concatenate([piece.labels for piece in fixtures.pieces("train")])
    assert base_rate(fixtures.dataset()) == pytest.approx(float(np.nanmean(labels)), abs=1e-7)


def test_the_head_starts_at_the_base_rate(tmp_path: Path) -> None:
    found = build(config(tmp_path))
    rate = base_rate(found.dataset)
    assert torch.sigmoid(found.hllm.head.out.bias).item() == pytest.approx(rate, abs=1e-6)


# --- items -----------------------------------------------------------------------------------------------


def catalogue(settings: Config) -> Tensor:
    found = build(settings).encode_catalogue()
    assert found is not None
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dense", ["ddp", "fsdp"])
def test_the_catalogue_is_encoded_alike_on_one_and_two_ranks(dense: str, tmp_path: Path) -> None:
    settings = config(tmp_path, parallel__dense=dense)
    one = catalogue(settings)
    assert one.shape == (fixtures.dataset().num_items, 16) and not one.requires_grad
    for found in run_ranks(catalogue, 2, settings):
        torch.testing.assert_close(found, one, atol=1e-6, rtol=0)


def test_the_catalogue_holds_what_a_step_would_compute_and_leaves_the_mode(tmp_path: Path) -> None:
    experiment = build(config(tmp_path))
    item_llm = experiment.hllm.item_llm
    for training in (True, False):
        experiment.hllm.train(training)
        table = experiment.encode_catalogue()
        assert item_llm.training is training
    ids = torch.tensor([40, 0, 7, 3])
    with torch.no_grad():
        live = experiment.hllm.item_embeddings(ids)
    torch.testing.assert_close(table[ids], live, atol=1e-6, rtol=0)
    experiment.hllm.item_source = CachedItems(table + 1)
    torch.testing.assert_close(experiment.hllm.item_embeddings(ids), live + 1, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        experiment.hllm.embed_items(ids, experiment.live_items), live, atol=1e-6, rtol=0
    )  # never the cache


def test_many_chunks_give_the_same_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = build(config(tmp_path))
    at_once = experiment.encode_catalogue()
    monkeypatch.setattr("hllm_torchrec.models.item_encoder.CATALOGUE_TOKENS", 20)
    tokens = experiment.item_encoder.tokens
    chunks = length_sorted_chunks(np.arange(len(tokens)), tokens.lengths + 1, 20)
    assert len(chunks) > 5 and sorted(np.concatenate(chunks).tolist()) == list(range(fixtures.dataset().num_items))
    torch.testing.assert_close(experiment.encode_catalogue(), at_once, atol=1e-6, rtol=0)


def test_a_model_of_ids_has_no_catalogue_to_encode(tmp_path: Path) -> None:
    experiment = build(config(tmp_path, item_llm__enabled=False))
    assert experiment.encode_catalogue() is None and experiment.item_encoder is None


def test_cold_items_are_those_without_a_training_event(tmp_path: Path) -> None:
    seen = np.unique(np.concatenate([piece.item_ids for piece in fixtures.pieces("train")]))
    cold = build(config(tmp_path)).cold_items()
    assert cold.shape == (fixtures.dataset().num_items,)
    assert np.flatnonzero(~cold).tolist() == seen.tolist()


# --- what does not fit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data__item_features": ["genre"]}, r"data.item_features: 'genre': .*genres"),
        ({"data__user_features": ["age"]}, r"data.user_features: 'age': .*country"),
        ({"data__numeric_features": ["mean"]}, r"data.numeric_features: 'mean': unknown"),
        ({"item_llm__tokenizer": None}, "item_llm.tokenizer: none: an Item LLM from scratch still needs"),
        ({"item_llm__text_keys": ["plot"]}, "no text column plot; it has title, brand"),
        ({"item_llm__shape": {**USER_LLAMA, "vocab_size": 5}}, r"up to \d+, but the Item LLM has 5 word vectors"),
        (
            {
                "item_llm__shape": {**fixtures.BERT, "vocab_size": 64, "max_position_embeddings": 6},
                "item_llm__causal": False,
                "item_llm__max_text_length": 6,
            },
            r"item_llm.max_text_length: the longest text has 6 tokens, and \[ITEM\] follows, .* 6 position .* most 5",
        ),
        ({"user__layers": 3}, "layers: 3: the backbone has 1"),
    ],
)
def test_what_does_not_fit_the_dataset_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build(config(tmp_path, **options))


def test_all_features_that_the_dataset_lacks_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        build(config(tmp_path, data__item_features=["a"], data__user_features=["b"], data__numeric_features=["c"]))
    assert len(raised.value.problems) == 3


def test_a_missing_dataset_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a prepared dataset: .* Make one with `hllm prepare"):
        build(config(tmp_path, data__dataset=tmp_path / "none"))
