"""Parallelism changes where things are, not what they are: plans, replicas and shards give the same numbers."""

import logging
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torchrec.distributed.types import ShardedTensor

from hllm_torchrec.checkpoint.load import latest_checkpoint
from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.schema import Config
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.distributed.wrappers import full_tensor
from hllm_torchrec.embedding.optimizers import TableSettings
from hllm_torchrec.embedding.sharding import check_tables
from hllm_torchrec.modules.encoders.fused_products import compiled_elementwise
from hllm_torchrec.training.trainer import Trainer
from hllm_torchrec.training.trainer_setup import build_trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.training_fixtures import ITEM_LLAMA, config, lines, losses, train

GENTLE = {"optim__lr": 0.002, "optim__item_llm_lr": 0.002}
STAGES = [
    {"name": "live", "epochs": 0.6},
    {"name": "stored", "epochs": 0.4, "item_embeddings": "cached"},
]


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


# --- what the device cannot do ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"features__sharding": "row_wise"},
            "features.sharding: 'row_wise': .* choose table_wise or column_wise",
        ),
        (
            {"optim__table_optimizer": "adam"},
            "optim.table_optimizer: 'adam': FBGEMM has it on CUDA only; on a CPU",
        ),
        ({"optim__table_optimizer": "partial_rowwise_adam"}, "choose sgd, rowwise_adagrad, adagrad"),
    ],
)
def test_a_plan_that_the_cpu_cannot_do_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_fsdp_is_refused_on_a_cpu_with_the_torch_that_cannot_do_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cpu")
    with pytest.raises(ConfigError, match="parallel.dense: fsdp: torch 2.11.0.cpu fails .* 2.12 or later, or ddp"):
        train(config(tmp_path / "run", parallel__dense="fsdp"))


def test_all_problems_of_the_tables_are_reported_together_and_none_on_cuda(tmp_path: Path) -> None:
    settings = TableSettings.of(config(tmp_path, features__sharding="row_wise", optim__table_optimizer="adam"))
    assert len(check_tables(settings, torch.device("cpu"))) == 2
    assert check_tables(settings, torch.device("cuda")) == []


# --- tables ----------------------------------------------------------------------------------------------


def test_small_tables_are_replicated_and_large_ones_sharded(tmp_path: Path) -> None:
    trainer = build_trainer(config(tmp_path / "run"), init_distributed())
    tables = {
        name.split(".embedding_bags.")[1].removesuffix(".weight"): value
        for name, value in trainer.model.state_dict().items()
        if ".embedding_bags." in name
    }
    sharded = {name for name, value in tables.items() if isinstance(value, ShardedTensor)}
    assert sharded == {"item_id", "time_year", "time_day", "time_minute", "time_second"}  # 30 rows and more
    trained_by_adam = {id(p) for group in trainer.dense_optim.param_groups for p in group["params"]}
    by_name = dict(trainer.hllm.named_parameters())
    for name in tables:
        parameter = by_name[f"features.tables.embedding_bags.{name}.weight"]
        assert (id(parameter) in trained_by_adam) == (name not in sharded), name
    in_backward = {name.split("embedding_bags.")[1].split(".")[0] for name in trainer.model.fused_optimizer.params}
    assert in_backward == sharded


def test_a_table_optimizer_that_no_table_has_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chosen = {"optim__table_optimizer": "adagrad", "optim__table_options": {"eps": 1e-6}}
    for more in (chosen, {"features__shard_from_rows": 10_000}):
        build_trainer(config(tmp_path / "run", **more), init_distributed())
        destroy_distributed()
    assert "have no effect" not in caplog.text
    build_trainer(config(tmp_path / "run", features__shard_from_rows=10_000, **chosen), init_distributed())
    assert (
        "table_options and table_lr have no effect: no table has features.shard_from_rows (10000) rows" in caplog.text
    )


@pytest.mark.parametrize("rate", ["table", "dense"])
def test_each_kind_of_table_is_moved_by_its_own_optimizer_only(rate: str, tmp_path: Path) -> None:
    rates = {"optim__lr": 0.0, "optim__item_llm_lr": 0.0, "optim__table_lr": 0.0, "optim__weight_decay": 0.0}
    rates |= {"optim__table_lr": 0.1} if rate == "table" else {"optim__lr": 0.1}
    trainer = build_trainer(config(tmp_path / "run", max_steps=2, **rates), init_distributed())
    before = _tables(trainer)
    trainer.run()
    moved = {name for name, value in _tables(trainer).items() if not torch.equal(value, before[name])}
    sharded = {"item_id", "time_year", "time_day", "time_minute", "time_second"}
    assert moved == (sharded if rate == "table" else before.keys() - sharded)


def _tables(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All rows of each table, on one rank."""
    found = {}
    for name, value in trainer.model.state_dict().items():
        if ".embedding_bags." in name:
            local = value.local_shards()[0].tensor if isinstance(value, ShardedTensor) else value
            found[name.split(".embedding_bags.")[1].removesuffix(".weight")] = local.detach().clone()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["column_wise", "auto"])
def test_other_plans_train_alike(sharding: str, tmp_path: Path) -> None:
    """With SGD, whose update does not depend on how a row is cut (row-wise Adagrad's does)."""
    options = {**GENTLE, "optim__table_optimizer": "sgd", "max_steps": 4}
    train(config(tmp_path / "one", **options))
    two = config(tmp_path / "two", features__sharding=sharding, data__batch_users=2, **options)
    run_ranks(train_and_stop, 2, two)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_every_table_optimizer_of_the_cpu_trains_alike_on_two_ranks(optimizer: str, tmp_path: Path) -> None:
    options = {**GENTLE, "optim__table_optimizer": optimizer, "max_steps": 3, "features__shard_from_rows": 1}
    train(config(tmp_path / "one", **options))
    run_ranks(train_and_stop, 2, config(tmp_path / "two", data__batch_users=2, **options))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


def test_a_model_without_tables_trains(tmp_path: Path) -> None:
    none = {"features__item_id": False, "features__action": False, "features__time_depth": 0}
    features = {"data__item_features": [], "data__user_features": []}
    for dense in ("ddp", "fsdp"):
        train(config(tmp_path / dense, max_steps=2, parallel__dense=dense, **none, **features))
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "ddp"), abs=1e-6)


def train_and_stop(settings: Config) -> dict[str, Any]:
    return train(settings).metrics


# --- FSDP2 -----------------------------------------------------------------------------------------------


SHARDED = {
    "late, both losses, averaged": {
        "objective__fusion": "late",
        "objective__generative_weight": 0.5,
        "optim__ema": 0.9,
    },
    "early, accumulated": {"objective__fusion": "early", "optim__accumulate": 2},
    "none, mean": {"objective__fusion": "none", "item_llm__pooling": "mean"},
    "words and user frozen": {"item_llm__freeze_words": True, "user__trainable": False},
    "items frozen": {"item_llm__trainable": False, "objective__fusion": "early"},
}


@pytest.fixture(scope="module")
def ddp_and_fsdp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A folder with each run of `SHARDED` on two ranks, "NAME ddp" and "NAME fsdp", and each rank's metrics by name."""
    folder = tmp_path_factory.mktemp("kinds")
    common = {**GENTLE, "stages": STAGES, "data__batch_users": 2, "evaluation__every": 0.4}
    settings = {
        f"{name} {dense}": config(folder / f"{name} {dense}", parallel__dense=dense, **common, **own)
        for name, own in SHARDED.items()
        for dense in ("ddp", "fsdp")
    }
    return folder, run_ranks(train_each, 2, settings, timeout=300)


def train_each(settings: dict[str, Config]) -> dict[str, Any]:
    return {name: train(of_one).metrics for name, of_one in settings.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_fsdp_equals_ddp(name: str, ddp_and_fsdp: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = ddp_and_fsdp
    assert losses(folder / f"{name} fsdp") == pytest.approx(losses(folder / f"{name} ddp"), abs=1e-4)
    for found in ranks:
        assert found[f"{name} fsdp"] == pytest.approx(found[f"{name} ddp"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dense", ["ddp", "fsdp"])
def test_weights_changed_between_two_forward_passes_are_seen(dense: str, tmp_path: Path) -> None:
    settings = config(tmp_path / "run", parallel__dense=dense, max_steps=1)
    for trained, changed in run_ranks(evaluate_twice, 2, settings):
        assert changed["log_loss"] != pytest.approx(trained["log_loss"], abs=1e-2)


def evaluate_twice(settings: Config) -> list[dict[str, Any]]:
    """Metrics before and after a change of a weight as the optimizer holds it (under FSDP2: the shard)."""
    trainer = train(settings)
    bias = trainer.hllm.head.out.bias
    assert any(bias is p for group in trainer.dense_optim.param_groups for p in group["params"])
    trained = trainer.evaluate()
    with torch.no_grad():
        bias.add_(1.0)
    return [trained, trainer.evaluate()]


@pytest.mark.slow
def test_fsdp_shards_every_dense_weight_and_its_optimizer_state(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", parallel__dense="fsdp", max_steps=1, objective__generative_weight=1)
    for sizes in run_ranks(local_sizes, 2, settings):
        assert sizes["unsharded"] == []
        assert sizes["mine"] <= 0.55 * sizes["all"]
        assert sizes["state"] <= 0.55 * sizes["all"] * 2 + sizes["parameters"]  # two means each, and a counter


def local_sizes(settings: Config) -> dict[str, Any]:
    """What of the dense weights this rank holds."""
    trainer = train(settings)
    dense = {n: p for n, p in trainer.hllm.named_parameters() if ".embedding_bags." not in n}
    states = [value for p in dense.values() for value in trainer.dense_optim.state[p].values()]
    return {
        "unsharded": [name for name, p in dense.items() if not isinstance(p, DTensor)],
        "all": sum(p.numel() for p in dense.values()),
        "mine": sum(p.to_local().numel() for p in dense.values() if isinstance(p, DTensor)),
        "state": sum(v.to_local().numel() if isinstance(v, DTensor) else v.numel() for v in states),
        "parameters": len(dense),
    }


@pytest.mark.slow
def test_replicated_weights_are_equal_on_all_ranks_after_training(tmp_path: Path) -> None:
    """Also under FSDP2, where the replicated tables have a DDP of their own."""
    for dense in ("ddp", "fsdp"):
        settings = config(tmp_path / dense, parallel__dense=dense, data__batch_users=2, max_steps=3)
        first, second = run_ranks(whole_weights, 2, settings)
        assert first.keys() == second.keys() and len(first) > 30
        assert not [name for name in first if not torch.equal(first[name], second[name])]


def whole_weights(settings: Config) -> dict[str, torch.Tensor]:
    trainer = train(settings)
    sharded = ("item_id", "time_year", "time_day", "time_minute", "time_second")
    return {
        name: full_tensor(p.detach()).clone()
        for name, p in trainer.hllm.named_parameters()
        if not any(f".{table}." in name for table in sharded)
    }


@pytest.mark.slow
def test_a_checkpoint_of_one_kind_resumes_as_the_other(tmp_path: Path) -> None:
    options = {**GENTLE, "stages": STAGES, "optim__ema": 0.9, "objective__generative_weight": 0.5}
    options |= {"evaluation__checkpoint_every": 2, "evaluation__keep_last": 100}
    train(config(tmp_path / "whole", data__batch_users=4, **options))
    kinds, options = {"ddp": "fsdp", "fsdp": "ddp"}, options | {"data__batch_users": 2}
    begun = [config(tmp_path / saved, parallel__dense=saved, **options) for saved in kinds]
    run_ranks(train_and_remove_later, 2, begun)
    resumed = {
        saved: config(tmp_path / saved, parallel__dense=loaded, resume=True, **options)
        for saved, loaded in kinds.items()
    }
    metrics = run_ranks(train_each, 2, resumed)
    for saved in kinds:
        assert losses(tmp_path / saved) == pytest.approx(losses(tmp_path / "whole"), abs=1e-4), saved
        assert [line["step"] for line in lines(tmp_path / saved, "start")] == [0, 4]
    assert metrics[0] == metrics[1]


def train_and_remove_later(settings: list[Config]) -> None:
    """Train each, then remove all checkpoints after step 4, as if the run had been cut off there."""
    import shutil

    for of_one in settings:
        train(of_one)
        if dist.get_rank() == 0:
            for path in (Path(of_one.output) / "checkpoints").glob("step-*"):
                if int(path.name[5:]) > 4:
                    shutil.rmtree(path)
        dist.barrier()
        found = latest_checkpoint(Path(of_one.output) / "checkpoints")
        assert found is not None and found.name == "step-00000004"


# --- activation checkpointing and precision --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dense", ["ddp", "fsdp"])
def test_activation_checkpointing_gives_the_same_losses(dense: str, tmp_path: Path) -> None:
    options = {
        "parallel__dense": dense,
        "objective__generative_weight": 0.5,
        "max_steps": 4,
        "stages": STAGES,
    }
    train(config(tmp_path / "kept", **options))
    trainer = train(config(tmp_path / "again", parallel__activation_checkpointing=True, **options))
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "kept"), abs=1e-6)
    assert trainer.hllm.user.backbone.is_gradient_checkpointing


@pytest.mark.long
@pytest.mark.parametrize(("dense", "layers"), [("fsdp", 1), ("ddp", 2)])
def test_compiled_layers_give_the_same_losses(dense: str, layers: int, tmp_path: Path) -> None:
    """Each graph is a call of the C++ compiler: about 30 where the Item LLM has a layer before its last."""
    options = {"parallel__dense": dense, "objective__fusion": "early", "max_steps": 2}
    options |= {"item_llm__shape": {**ITEM_LLAMA, "num_hidden_layers": layers}}
    train(config(tmp_path / "plain", **options))
    train(config(tmp_path / "compiled", parallel__compile=True, **options))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)


@pytest.mark.slow
def test_the_layers_of_both_llms_are_compiled_and_nothing_else(tmp_path: Path) -> None:
    with torch.compiler.set_stance("force_eager"):  # what is compiled runs as it is: no C++ compiler
        trainer = train(config(tmp_path / "run", parallel__compile=True, max_steps=1))
    compiled = {name for name, module in trainer.hllm.named_modules() if module._compiled_call_impl is not None}
    layers = {*trainer.hllm.item_llm.backbone.layers, *trainer.hllm.user.backbone.layers}
    assert compiled == {name for name, module in trainer.hllm.named_modules() if module in layers}
    assert len(compiled) == 3


@pytest.mark.slow
def test_fused_layers_get_compiled_functions_instead(tmp_path: Path) -> None:
    with torch.compiler.set_stance("force_eager"):
        options = {"parallel__compile": True, "parallel__precision": "bf16", "max_steps": 1}
        trainer = train(config(tmp_path / "run", **options))
    assert not any(module._compiled_call_impl for module in trainer.hllm.modules())
    layers = [*trainer.hllm.item_llm.backbone.layers, *trainer.hllm.user.backbone.layers]
    assert all(layer.elementwise is compiled_elementwise() for layer in layers)


@pytest.mark.slow
def test_a_shared_prefix_gives_the_same_losses(tmp_path: Path) -> None:
    options = {"max_steps": 3, "objective__generative_weight": 1, **GENTLE}
    found = {}
    for share in (True, False):
        trainer = train(config(tmp_path / str(share), item_llm__share_prefix=share, **options))
        assert trainer.experiment.item_encoder is not None
        found[share] = trainer.experiment.item_encoder.work.tokens
        destroy_distributed()
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), abs=1e-5)
    assert found[True] < found[False], "two tokens of each item are the same"
    assert lines(tmp_path / "True", "start")[0]["item_attention"].startswith("buckets: varlen runs on CUDA only")


@pytest.mark.parametrize("kernel", ["varlen", "flash"])
def test_a_kernel_that_the_cpu_has_not_is_refused(kernel: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"item_llm.attention: {kernel} .*; choose auto"):
        train(config(tmp_path / "run", item_llm__attention=kernel))


def test_a_kernel_of_hstu_that_the_cpu_has_not_is_refused_and_auto_says_what_it_took(tmp_path: Path) -> None:
    shape = {"width": 16, "layers": 1}
    with pytest.raises(ConfigError, match="user.shape.backend: 'triton': cannot run on cpu: it needs CUDA"):
        train(config(tmp_path / "no", user__encoder="hstu", user__shape=shape | {"backend": "triton"}))
    destroy_distributed()
    options = {"user__encoder": "hstu", "user__shape": shape | {"backend": "auto"}, "max_steps": 1}
    train(config(tmp_path / "auto", **options))
    reason = "eager, because triton cannot run here: it needs CUDA"
    assert lines(tmp_path / "auto", "start")[0]["user_attention"] == reason


@pytest.mark.slow
def test_bfloat16_trains_near_float32(tmp_path: Path) -> None:
    train(config(tmp_path / "wide", max_steps=3))
    trainer = train(config(tmp_path / "narrow", max_steps=3, parallel__precision="bf16"))
    wide, narrow = losses(tmp_path / "wide"), losses(tmp_path / "narrow")
    assert narrow != wide and narrow == pytest.approx(wide, abs=0.02)
    assert all(p.dtype == torch.float32 for p in trainer.hllm.parameters())


# --- joining and leaving ---------------------------------------------------------------------------------


def test_a_process_alone_is_a_job_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert init_distributed().type in ("cpu", "cuda")
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    init_distributed()  # joining twice is allowed
    destroy_distributed()
    destroy_distributed()
    assert not dist.is_initialized()


def test_a_port_in_use_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        for name, value in (
            ("MASTER_ADDR", "localhost"),
            ("MASTER_PORT", port),
            ("RANK", "0"),
            ("WORLD_SIZE", "2"),
        ):
            monkeypatch.setenv(name, value)
        with pytest.raises(ConnectionError, match=rf"rank 0 of 2 .* localhost:{port}: the port is in use: choose"):
            init_distributed(timeout=5)


@pytest.mark.slow
def test_a_rank_whose_job_does_not_come_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    for name, value in (
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", port),
        ("RANK", "1"),
        ("WORLD_SIZE", "2"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConnectionError, match=rf"rank 1 of 2 could not join the others at localhost:{port}: "):
        init_distributed(timeout=1)


# --- messages --------------------------------------------------------------------------------------------


def test_other_messages_of_the_same_libraries_pass(caplog: pytest.LogCaptureFixture) -> None:
    init_distributed()
    logging.getLogger("torchrec.distributed.utils").warning("a table does not fit")
    logging.getLogger("torchrec.distributed.utils").warning(
        "Sharding Type is data_parallel, caching params will be ignored"
    )
    logging.getLogger().warning("Sharding spec not found for features.tables.x")
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        "a table does not fit"
    ]
    with pytest.warns(FutureWarning, match="something else"):
        warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
