"""Stage II: a run that begins with another's weights and takes item embeddings from a store, which it leaves alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hllm_torchrec.checkpoint.load import best_checkpoint
from hllm_torchrec.checkpoint.safe_reader import SafeReader
from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.schema import Config
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.catalogue_retrieval import catalogue_vectors
from hllm_torchrec.evaluation.run_loader import load_run, score_run
from hllm_torchrec.inference.item_embedding import embed_items
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.models.stored_items import use_stored_items
from hllm_torchrec.modules.features.frozen_items import FROZEN_ITEMS
from hllm_torchrec.store import EmbeddingStore
from hllm_torchrec.training.trainer import Trainer
from hllm_torchrec.training.trainer_setup import build_trainer
from hllm_torchrec.training.warm_start import start_checkpoint, warm_start
from tests.helpers import fixtures
from tests.helpers.distributed import run_ranks
from tests.helpers.training_fixtures import (
    USER_LLAMA,
    assert_equal_weights,
    config,
    interrupted,
    lines,
    losses,
    train,
    weights,
)

STORED = [{"name": "stored", "epochs": 1, "item_embeddings": "stored"}]
SMALL: dict[str, Any] = {"stages": [{"name": "first", "epochs": 0.5}], "evaluation__batch_users": 24}


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `one`, a run of stage I (averaged weights), and `items`, the store that it has made."""
    folder = tmp_path_factory.mktemp("stages")
    train(config(folder / "one", optim__ema=0.5, **SMALL))
    loaded = load_run(folder / "one", "best", init_distributed())
    with loaded.weights:
        embed_items(loaded.experiment, folder / "items")
    destroy_distributed()
    return folder


def second(first: Path, output: Path, **settings: Any) -> Config:
    options = {"stages": STORED, "item_llm__store": first / "items", "start_from": first / "one", **settings}
    return config(output, **(SMALL | options))


def contents(trainer: Trainer) -> list[torch.Tensor]:
    """This rank's parts of the frozen table."""
    (value,) = (v for k, v in trainer.hllm.item_source.table.state_dict().items() if FROZEN_ITEMS in k)
    return [shard.tensor.detach().clone() for shard in value.local_shards()]


def train_stored(settings: Config) -> dict[str, Any]:
    trainer = build_trainer(settings, init_distributed())
    use_stored_items(trainer.experiment)
    trained = {id(p) for group in trainer.dense_optim.param_groups for p in group["params"]}
    item_llm = {name: p.detach().clone() for name, p in trainer.hllm.item_llm.named_parameters()}
    before = contents(trainer)
    head = {name: value.clone() for name, value in trainer.hllm.head.state_dict().items()}
    metrics = trainer.run()  # fills a table of its own
    after = contents(trainer)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return {
        "bytes": sum(part.numel() for part in after),
        "type": after[0].dtype if after else None,
        "in_optimizer": any(id(p) in trained for p in trainer.hllm.item_source.table.parameters()),
        "item_llm_same": all(torch.equal(item_llm[n], p) for n, p in trainer.hllm.item_llm.named_parameters()),
        "head_moved": any(not torch.equal(head[n], v) for n, v in trainer.hllm.head.state_dict().items()),
        "metrics": metrics,
        "names": [name for name, _ in trainer.hllm.named_parameters()],
        "ema": list(trainer.ema.state_dict()) if trainer.ema else [],
    }


@pytest.mark.slow
@pytest.mark.parametrize("dense", ["ddp", "fsdp"])
def test_on_two_ranks_the_table_keeps_every_byte_and_is_in_no_checkpoint(
    dense: str, first: Path, tmp_path: Path
) -> None:
    options = {"parallel__dense": dense, "optim__ema": 0.9, "item_llm__adapter": 3}
    options |= {"objective__generative_weight": 0.5, "evaluation__retrieval": True}
    found = run_ranks(train_stored, 2, second(first, tmp_path / "two", **options))
    width = 16
    assert sum(one["bytes"] for one in found) == fixtures.dataset().num_items * width
    assert {one["type"] for one in found} <= {torch.float16, None}
    assert 0 < found[0]["metrics"]["mrr"] == found[1]["metrics"]["mrr"]
    for one in found:
        assert one["item_llm_same"] and one["head_moved"] and not one["in_optimizer"]
        assert not any(FROZEN_ITEMS in name for name in one["names"] + one["ema"])
    saved = SafeReader(best_checkpoint(tmp_path / "two" / "checkpoints")).read_tensors()
    assert saved and not any(FROZEN_ITEMS in key for key in saved)
    assert lines(tmp_path / "two", "end")[0]["live_steps"] == 0


@pytest.mark.slow
def test_two_ranks_and_one_take_the_same_steps(first: Path, tmp_path: Path) -> None:
    train(second(first, tmp_path / "one", data__batch_users=8))
    destroy_distributed()
    run_ranks(train_stored, 2, second(first, tmp_path / "two", data__batch_users=4))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


def test_it_begins_with_the_averaged_weights_of_the_other_run(first: Path, tmp_path: Path) -> None:
    loaded = load_run(first / "one", "best", init_distributed())
    with loaded.weights:
        expected = {name: p.detach().clone() for name, p in loaded.experiment.hllm.named_parameters()}
    for source in (first / "one", loaded.checkpoint):
        settings = second(first, tmp_path / "two", seed=5, start_from=source)
        experiment = build_experiment(settings, init_distributed())
        checkpoint = start_checkpoint(experiment.config)
        assert checkpoint is not None
        warm_start(experiment, checkpoint)
        assert_equal_weights(dict(experiment.hllm.named_parameters()), expected)


def test_new_parts_begin_anew_but_another_user_encoder_is_refused(first: Path, tmp_path: Path) -> None:
    options = {"objective__generative_weight": 0.1, "objective__value_weight": 0.1, "max_steps": 1}
    assert train(second(first, tmp_path / "two", **options)).step == 1
    other_head = options | {"objective__head_hidden": 5}
    with pytest.raises(ValueError, match=r"of another shape: model\.head\..* initial values \(start_from_skip: \[PART"):
        train(second(first, tmp_path / "head", **other_head))
    assert train(second(first, tmp_path / "head", **other_head, start_from_skip=["head"])).step == 1
    with pytest.raises(ValueError, match=r"is not of this model: .* model\.user\."):
        train(second(first, tmp_path / "three", user__shape={**USER_LLAMA, "num_hidden_layers": 2}))


def test_the_model_sees_the_vectors_of_the_store(first: Path, tmp_path: Path) -> None:
    experiment = build_experiment(second(first, tmp_path / "two", objective__generative_weight=0.5), init_distributed())
    checkpoint = start_checkpoint(experiment.config)
    assert checkpoint is not None
    warm_start(experiment, checkpoint)
    use_stored_items(experiment)
    ids = fixtures.dataset().items["raw_item_id"].to_pylist()
    stored, _ = EmbeddingStore.open(first / "items").snapshot().gather(ids)
    expected = torch.cat([torch.zeros(1, 16), stored])
    torch.testing.assert_close(experiment.hllm.item_embeddings(torch.tensor([4, 2])), expected[[4, 2]], atol=0, rtol=0)
    torch.testing.assert_close(experiment.encode_catalogue(), expected, atol=0, rtol=0)
    torch.testing.assert_close(catalogue_vectors(experiment), expected, atol=0, rtol=0)
    source = experiment.hllm.item_source
    with experiment.evaluation_items():
        assert experiment.hllm.item_source is source  # the catalogue need not fit on a rank


@pytest.mark.slow
def test_the_evaluation_job_scores_such_a_run_as_training_did(first: Path, tmp_path: Path) -> None:
    options = {"objective__generative_weight": 0.5, "evaluation__retrieval": True, "item_llm__adapter": 2}
    trainer = train(second(first, tmp_path / "two", **options))
    assert not torch.equal(trainer.hllm.adapter.up.weight, torch.zeros(16, 2))
    scores = score_run(tmp_path / "two", "valid", "best", init_distributed())
    assert scores.retrieval["mrr"] == pytest.approx(trainer.metrics["mrr"], abs=1e-6)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(first: Path, tmp_path: Path) -> None:
    options = {"evaluation__checkpoint_every": 2, "evaluation__keep_last": 100, "optim__ema": 0.9}
    whole = train(second(first, tmp_path / "whole", **options))
    run = interrupted(tmp_path / "whole", tmp_path / "run", 2)
    resumed = train(second(first, run, resume=True, **options))
    assert losses(run) == losses(tmp_path / "whole") and resumed.step == whole.step > 2
    assert_equal_weights(weights(resumed), weights(whole))


@pytest.mark.slow
def test_a_store_of_another_model_or_without_some_items_is_refused(first: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"item_llm\.store: .*made by another model \(weights differ\).*start_from"):
        train(second(first, tmp_path / "two", start_from="null"))
    with pytest.raises(ConfigError, match=r"made by another model \(causal differ\)"):
        train(second(first, tmp_path / "two", item_llm__causal=False))
    loaded = load_run(first / "one", "best", init_distributed())
    with loaded.weights:
        embed_items(loaded.experiment, tmp_path / "items")
    store = EmbeddingStore.open(tmp_path / "items")
    with store.writer() as writer:
        writer.delete(fixtures.dataset().items["raw_item_id"].to_pylist()[:2])
        writer.commit()
    with pytest.raises(ConfigError, match="lacks 2 of the dataset's"):
        train(second(first, tmp_path / "two", item_llm__store=tmp_path / "items"))
    with pytest.raises(ConfigError, match=r"item_llm\.store: .*nowhere: no embedding store .*hllm embed"):
        train(second(first, tmp_path / "two", item_llm__store=tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"start_from: .*nowhere: neither a checkpoint nor a run"):
        train(second(first, tmp_path / "two", start_from=tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": STORED}, r"item_llm\.store: none: item_embeddings: stored needs the store"),
        ({"item_llm__store": "x"}, r"item_llm\.store: 'x': no stage has item_embeddings: stored"),
        ({"item_llm__adapter": 4}, r"item_llm\.adapter: 4: no stage has item_embeddings: stored"),
        ({"stages": STORED, "item_llm__store": "x", "item_llm__enabled": False}, r"item_llm\.enabled: false while"),
        (
            {"stages": [*STORED, {"name": "b", "epochs": 1}], "item_llm__store": "x"},
            r"stages\[1\]\.item_embeddings: 'trained': other stages have 'stored'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **settings)
