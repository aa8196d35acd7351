"""Estimates against what is really kept, counted and placed; plans for ranks that do not exist."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.loader import Loader, LoaderSpec
from hllm_torchrec.data.token_store import TokenStore
from hllm_torchrec.launch import plan as command
from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from hllm_torchrec.planning.activations import decoder_activation_bytes, saved_tensor_bytes
from hllm_torchrec.planning.estimate import HARDWARE, Machine, Workload, advice, estimate
from tests.helpers import fixtures

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {**fixtures.LLAMA, "hidden_size": 64, "intermediate_size": 160}
H100 = HARDWARE["h100"]


def config(**sections: Any) -> Config:
    return fixtures.config(item_llm={"shape": LLAMA}, **sections)


def on(world: int, made: Config | None = None, **work: float) -> Any:
    sizes = Workload(**{"items": 1000, "users": 1000, "item_tokens": 10.0, "history": 32.0, **work})
    tables = {"item_id": int(sizes.items) + 1, "action": 7}
    return estimate(made or config(), sizes, Machine(max(1, world // 8), min(8, world), **H100), tables)


@pytest.mark.parametrize("layers", [2, 4])
def test_activations_are_what_autograd_keeps(layers: int) -> None:
    """A batch of items of one length, by the Item LLM as it trains."""
    shape = {**LLAMA, "num_hidden_layers": layers}
    items, length = 40, 12
    model = ItemLLM(build_backbone(None, shape))
    ids = torch.randint(0, 32, (items * (length - 1),))
    with saved_tensor_bytes(model) as kept:
        model(ids, torch.arange(items + 1) * (length - 1))
    estimated = decoder_activation_bytes(model.backbone.config, length, config())
    without_temporaries = estimated.total(items, False, model.reads_rows) - items * estimated.transient
    assert sum(kept.values()) == pytest.approx(without_temporaries, rel=0.15)


def test_checkpointing_keeps_the_layers_inputs_and_one_layer() -> None:
    deep = build_backbone(None, {**LLAMA, "num_hidden_layers": 12}).config
    kept = decoder_activation_bytes(deep, 16, config())
    assert kept.total(10, True) < 0.35 * kept.total(10, False)


@pytest.mark.slow
def test_weights_are_those_of_the_model_shared_by_fsdp() -> None:
    made = config()
    own = fixtures.model(made)
    dense = sum(p.numel() for name, p in own.named_parameters() if ".embedding_bags." not in name)
    assert on(1, made).memory["weights"] == 4 * dense
    assert on(1, made).memory["optimizer"] == 8 * dense
    shared = on(32, config(parallel={"dense": "fsdp"})).memory
    assert shared["weights"] == pytest.approx(4 * dense / 32) and shared["gathered weights"] < 4 * dense


@pytest.mark.slow
def test_the_real_planner_places_tables_on_up_to_512_ranks() -> None:
    for world in (32, 512):
        found = on(world, config(features={"sharding": "auto"}), items=3_000_000_000)  # 204 GB
        assert found.tables["action"] == "data_parallel on every rank"
        kind, _, ranks, _ = found.tables["item_id"].split()
        assert kind in ("row_wise", "table_row_wise") and 8 <= int(ranks) <= world
        row = 16 * 4 + 4  # D floats and row-wise Adagrad's one
        assert found.memory["tables"] == pytest.approx(3e9 * row / int(ranks), rel=0.05)


def test_tables_that_fit_nowhere_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"cannot place the tables on 1 ranks of 80\.0 GB, of which 60% are for"):
        on(1, items=3_000_000_000)


@pytest.mark.parametrize("popular", [False, True])
def test_unique_items_are_those_of_draws(popular: bool) -> None:
    counts = np.arange(1, 501) ** 2 if popular else np.ones(500, np.int64)
    work = Workload(500, 1, 1, 1, counts if popular else None)
    drawn = []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        events = rng.choice(500, 700, p=counts / counts.sum())
        drawn.append(np.unique(np.concatenate([events, rng.integers(0, 500, 100)])).size)
    assert work.unique(700, 100) == pytest.approx(np.mean(drawn), rel=0.02)
    assert work.unique(0, 0) == 0


@pytest.mark.slow
def test_the_papers_7b_fits_32_gpus_only_with_what_its_configuration_says(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--config", str(ROOT / "configs/paper/books_hllm_7b.yaml"), "--nodes", "4", "--items", "700000"]
    assert command.main([*given, "--users", "700000", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    both = 2 * 6.5e9 * 4 / 32  # two LLMs without heads in fp32, shared by 32 ranks
    assert found["memory"]["weights"] == pytest.approx(both, rel=0.1)
    assert command.main([*given, "--users", "700000", "--parallel.dense", "ddp"]) == 1
    assert "parallel.dense: fsdp shares" in capsys.readouterr().out


def test_the_published_creator_is_planned_with_its_three_llms(capsys: pytest.CaptureFixture[str]) -> None:
    """TinyLlama twice and Qwen3-8B: weights of 10 billion, and activations of the third LLM."""
    file = str(ROOT / "configs" / "creator" / "books_1b_8b.yaml")
    given = ["--config", file, "--nodes", "8", "--hardware", "a100", "--items", "700000", "--users", "100000", "--json"]
    assert command.main(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["weights"] * 64 / 4 == pytest.approx(10.2e9, rel=0.05)
    assert found["memory"]["creative activations"] > 0 and found["memory"]["response loss"] > 0


def test_advice_names_what_is_large() -> None:
    small = Machine(1, 8, **(H100 | {"memory": 1e6}))
    found = on(8, config(data={"batch_users": 64}), history=1000.0)
    said = " ".join(advice(config(data={"batch_users": 64}), found, small))
    assert "activation_checkpointing" in said and "optim.accumulate: 2" in said
    assert advice(config(), on(8), Machine(1, 8, **H100)) == []


def test_what_cannot_be_known_is_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paper = str(ROOT / "configs/paper/pixel1m_hllm_1b.yaml")
    assert command.main(["--config", paper]) == 2
    assert "not prepared here: give the numbers of items and users with --items and --users" in capsys.readouterr().err
    assert command.main(["--config", paper, "--items=9", "--users=9", "--user.pretrained", "models/mystery"]) == 2
    assert "user.pretrained: models/mystery: has no config.json, and 'mystery'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--nodes=0", "0 is not at least 1"),
        ("--items=-5", "-5 is not at least 1"),
        ("--history=-5", "-5 is not a finite number above 0"),
        ("--memory=nan", "nan is not a finite number above 0"),
    ],
)
def test_numbers_that_no_machine_or_dataset_has_are_refused(
    option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paper = str(ROOT / "configs/paper/pixel1m_hllm_1b.yaml")
    with pytest.raises(SystemExit, match="2"):
        command.main(["--config", paper, "--items=9", "--users=9", option])
    assert f"argument {option.split('=')[0]}: {message}" in capsys.readouterr().err


def test_fake_and_real_forward_passes_keep_the_same() -> None:
    shape = build_backbone(None, LLAMA).config
    model = AutoModel.from_config(shape, attn_implementation="sdpa")
    model.set_input_embeddings(None)
    x = torch.zeros(3, 16, 64, requires_grad=True)
    with saved_tensor_bytes(model) as kept:
        model(inputs_embeds=x, use_cache=False)
    estimated = decoder_activation_bytes(shape, 16, config())
    assert sum(kept.values()) == pytest.approx(estimated.total(3, False) - 3 * estimated.transient, rel=0.1)


def test_a_table_of_positions_for_the_longest_history_is_planned_though_queries_follow_each_event() -> None:
    """A step has up to two rows for each event of a history, but a query takes the position of its event."""
    shape, fits = {"width": 16, "layers": 2, "heads": 1}, {"max_history": 16}
    small, large = (
        on(1, config(user={"encoder": "sasrec", "shape": {**shape, "max_positions": most}}, data=fits), history=15.0)
        for most in (16, 64)
    )
    # The estimate of the activations scales with the rows, whatever the table's size.
    assert small.memory["user activations"] == pytest.approx(large.memory["user activations"], rel=0.1)


def test_a_prepared_datasets_sizes_are_read() -> None:
    parsed = command.build_parser().parse_args(["--config", "x"])
    made = config()
    work, tables = command.workload(parsed, made)
    counts = fixtures.dataset().manifest["counts"]
    assert (work.items, work.users) == (counts["items"], counts["users"])
    assert tables["item_id"] == counts["items"] + 1
    path = fixtures.token_store().path  # of this configuration's texts
    as_they_are = replace(made, item_llm=replace(made.item_llm, share_prefix=False))
    lengths = TokenStore.open(path).lengths
    assert command.mean_tokens(path.parents[1], as_they_are) == pytest.approx(lengths.mean())
    assert command.mean_tokens(path.parents[1], made) < lengths.mean()


@pytest.mark.parametrize("world", [1, 2])
def test_the_busiest_step_is_near_that_of_the_loaders_epochs(world: int) -> None:
    made = config(data={"batch_users": 2, "max_history": 24})
    data = fixtures.dataset()
    collator = Collator(data, fixtures.recipe(made), 0, True)
    loader = Loader(data, collator, LoaderSpec("train", 2, 24, shuffle=True), world_size=world)
    together = [
        sum(int(loader.pieces.lengths[batches[step]].sum()) for batches in loader.rank_batches(epoch)) / world
        for epoch in range(20)
        for step in range(loader.steps(epoch) - 1)
    ]
    most = np.reshape(together, (20, -1)).max(1).mean()
    mean, busiest = command.passes(data, made, world)
    assert mean == pytest.approx(loader.pieces.lengths.mean())
    assert 2 * mean * busiest == pytest.approx(most, rel=0.15)
