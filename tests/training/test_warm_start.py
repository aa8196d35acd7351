"""A run a day later: its dataset has grown by items, users and values of features."""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from hllm_torchrec.checkpoint import layout
from hllm_torchrec.checkpoint.load import best_checkpoint, latest_checkpoint
from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.append import append_events
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.run_factors import RunFactors
from hllm_torchrec.data.sources.table_mapping import table
from hllm_torchrec.data.split import Split
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.embedding.tables import local_shards
from hllm_torchrec.evaluation.adoption import adopt
from hllm_torchrec.evaluation.run_loader import load_run, score_run, training_overlap
from hllm_torchrec.launch.adopt import main as adopt_command
from hllm_torchrec.launch.evaluate import main as evaluate
from hllm_torchrec.models.run_vocabulary import VOCABULARY
from hllm_torchrec.training.trainer import Trainer
from hllm_torchrec.training.trainer_setup import build_trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.fixtures import START
from tests.helpers.growing_shop import NEW_ITEMS, append_day, prepare_shop
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

TABLES = "features.tables.embedding_bags."
FACTORS = {"data__item_vectors": ["factors"]}


def settings(folder: Path, name: str, **changes: Any) -> Config:
    """A run without text, with averages, on the growing shop; checkpoints every two steps."""
    options = {"data__dataset": folder / "data", "item_llm__enabled": False, "optim__ema": 0.9} | changes
    return config(folder / name, **{"evaluation__checkpoint_every": 2, "evaluation__keep_last": 9, **options})


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `one` and `factors` of the dataset's first version, and the second version."""
    folder = tmp_path_factory.mktemp("night")
    prepare_shop(folder)
    train(settings(folder, "one"))
    train(settings(folder, "factors", **FACTORS))
    destroy_distributed()
    append_day(folder)
    return folder


def build(config: Config) -> Trainer:
    return build_trainer(config, init_distributed())


def rows(trainer: Trainer, table: str) -> torch.Tensor:
    """A table on the only rank."""
    return weights(trainer)[f"{TABLES}{table}.weight.0"]


def saved_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Weights of a run's best checkpoint on the version that it was trained on, not averaged."""
    loaded = load_run(folder / name, "best", init_distributed(), settings(folder, name, data__version=1))
    return {key: value.detach().clone() for key, value in loaded.experiment.hllm.named_parameters()}


def test_known_rows_are_kept_and_said(night: Path, caplog: pytest.LogCaptureFixture) -> None:
    begun = build(settings(night, "two", start_from=night / "one", optim__ema=0))
    before = load_run(night / "one", "best", init_distributed(), settings(night, "one", data__version=1))
    fresh = build(settings(night, "fresh"))
    with before.weights:
        for name, more in (("item_id", NEW_ITEMS), ("genres", 1), ("country", 1), ("action", 0)):
            kept = dict(before.experiment.hllm.named_parameters())[f"{TABLES}{name}.weight"].detach()
            assert len(rows(begun, name)) == len(kept) + more
            assert torch.equal(rows(begun, name)[: len(kept)], kept)
            assert torch.equal(rows(begun, name)[len(kept) :], rows(fresh, name)[len(kept) :])
    assert f"item_id: 40 of 40 ids kept, {NEW_ITEMS} new" in caplog.text
    assert "genres: 4 of 4 ids kept, 1 new" in caplog.text


def optimizer_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Adagrad's sums and AdamW's means of the tables, on the only rank."""
    state, found = trainer.state(), {}
    for name, moments in state["dense"].items():
        found |= {f"{name}.{kind}": value.clone() for kind, value in moments.items()}
    for name, sums in state["tables"].items():
        found |= {f"{name}.{kind}": value.local_shards()[0].tensor.clone() for kind, value in sums.items()}
    return found


def test_optimizers_and_averages_go_on_if_asked(night: Path) -> None:
    first = build(settings(night, "one", resume=True, data__version=1))
    first._resume()
    best = best_checkpoint(night / "one" / "checkpoints")
    assert best == latest_checkpoint(night / "one" / "checkpoints")  # so that both have the same state
    begun = build(settings(night, "two", start_from=night / "one", start_from_optimizer=True))
    assert begun.earlier_steps == first.step and begun.step == 0
    for pairs in (
        (weights(begun), weights(first)),
        (optimizer_state(begun), optimizer_state(first)),
        (begun.ema.state_dict(), first.ema.state_dict()),
    ):
        assert pairs[0].keys() == pairs[1].keys()
        for name, expected in pairs[1].items():
            found = pairs[0][name]
            assert torch.equal(found[: len(expected)] if expected.dim() else found, expected), name
    grown = [name for name, value in optimizer_state(begun).items() if len(value.shape) and "item_id" in name]
    assert all(not optimizer_state(begun)[name][-NEW_ITEMS:].any() for name in grown) and grown
    without = build(settings(night, "three", start_from=night / "one"))
    assert not any(value.any() for name, value in optimizer_state(without).items() if "momentum" in name)


def test_the_run_of_yesterday_is_evaluated_on_today(night: Path) -> None:
    scores = score_run(night / "one", "test", "best", init_distributed())
    assert scores.predictions is not None and scores.provenance["dataset"]["version"] == 2
    loaded = load_run(night / "one", "best", init_distributed())
    for name, expected in saved_weights(night, "one").items():
        found = dict(loaded.experiment.hllm.named_parameters())[name]
        assert torch.equal(found[: len(expected)] if expected.dim() else found, expected)


def test_exposures_that_a_run_was_trained_on_are_found_where_dates_moved_back(night: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(night / "data", tmp_path / "data"))
    mapping = Path(shutil.copytree(night / "shop", tmp_path / "shop")) / "mapping.yaml"
    (tmp_path / "shop" / "events.csv").write_text(f"customer,sku,second,rating,kind\nu1,s1,{START + 10**9},1,1\n")
    append_events(table(mapping), data, split=Split("date", train_until=START + 300_000, valid_until=START + 500_000))
    scores = score_run(night / "one", "test", "best", init_distributed(), data)
    assert scores.predictions is not None and (scores.dataset.version, scores.trained_on.version) == (3, 1)
    assert training_overlap(scores.predictions, scores.dataset).seen == 0
    found = training_overlap(scores.predictions, scores.trained_on)
    assert 0.5 * found.exposures < found.seen < found.exposures


def test_a_resumed_run_stays_with_its_version(night: Path, caplog: pytest.LogCaptureFixture) -> None:
    undisturbed = build(settings(night, "one", resume=True))
    undisturbed._resume()
    again = interrupted(night / "one", night / "again", 4)
    resumed = train(settings(night, "again", resume=True))
    assert "continues with version 1 of" in caplog.text and "(the newest is 2)" in caplog.text
    assert resumed.experiment.dataset.version == 1
    assert_equal_weights(weights(resumed), weights(undisturbed))
    assert losses(again) == losses(night / "one")
    with pytest.raises(
        ConfigError, match=r"data\.version: 2: the resumed run began with version 1; leave the field out"
    ):
        build(settings(night, "again", resume=True, data__version=2))
    assert yaml.safe_load((again / "config.yaml").read_text())["data"]["version"] is None


def test_a_part_may_be_frozen_or_be_new_in_the_next_run(night: Path) -> None:
    options = {"start_from": night / "one", "start_from_optimizer": True}
    build(settings(night, "two", user__trainable=False, **options))
    build(settings(night, "two", objective__value_weight=0.1, **options))
    more = build(settings(night, "two", **options, data__item_vectors=["factors"]))
    assert len(rows(more, "item_id")) == 41 + NEW_ITEMS
    with pytest.raises(ValueError, match=r"of another shape: .*model\.user\..*\. Choose another run, or parts"):
        build(settings(night, "two", user__shape={**USER_LLAMA, "intermediate_size": 32}, **options))


def test_the_next_night_resumes_exactly_too(night: Path) -> None:
    options = {"start_from": night / "one", "start_from_optimizer": True}
    undisturbed = train(settings(night, "next", **options))
    (start,) = lines(night / "next", "start")
    grown = start["start_from"]["known_and_new_ids"]
    assert grown == {"item_id": [40, NEW_ITEMS], "genres": [4, 1], "country": [3, 1]}
    assert start["dataset"]["version"] == 2 and Path(start["start_from"]["checkpoint"]).parent.parent == night / "one"
    interrupted(night / "next", night / "next-again", 2)
    resumed = train(settings(night, "next-again", resume=True, **options | {"start_from": night / "gone"}))
    assert resumed.earlier_steps == undisturbed.earlier_steps > 0
    assert_equal_weights(weights(resumed), weights(undisturbed))


# ---------------------------------------------------------------------- other ids


@pytest.fixture
def other_ids(tmp_path: Path) -> Path:
    """A dataset of the same shop whose items are in another order."""
    prepare_shop(tmp_path)
    head, *items = (tmp_path / "shop" / "items.csv").read_text().splitlines()
    (tmp_path / "shop" / "items.csv").write_text("\n".join([head, *reversed(items)]) + "\n")
    return prepare(table(tmp_path / "shop" / "mapping.yaml"), tmp_path / "reversed")


def test_other_ids_are_refused_by_name(night: Path, other_ids: Path) -> None:
    message = rf"step-\d+ was trained with other ids than those of {other_ids}: items: number 1 is 's39' here"
    with pytest.raises(ValueError, match=message):
        load_run(night / "one", "best", init_distributed(), dataset=other_ids)
    with pytest.raises(ValueError, match=message):
        build(settings(night, "two", start_from=night / "one", data__dataset=other_ids))
    skip = {"start_from_skip": [f"{TABLES}item_id", f"{TABLES}genres", f"{TABLES}country"]}
    begun = build(settings(night, "two", start_from=night / "one", data__dataset=other_ids, optim__ema=0, **skip))
    fresh, before = build(settings(night, "fresh", data__dataset=other_ids)), saved_weights(night, "one")
    assert torch.equal(rows(begun, "item_id"), rows(fresh, "item_id"))
    assert not torch.equal(rows(begun, "item_id"), before[f"{TABLES}item_id.weight"])
    with pytest.raises(ConfigError, match=r"start_from_skip: 'haed': no part of the model \(did you mean 'head'\?\)"):
        build(settings(night, "two", start_from=night / "one", start_from_skip=["haed"]))


def test_a_model_that_reads_no_ids_fits_any_catalogue(night: Path, other_ids: Path) -> None:
    free = {"features__item_id": False, "data__item_features": [], "data__user_features": [], "item_llm__enabled": True}
    train(settings(night, "free", max_steps=1, evaluation__checkpoint_every=0, **free))
    assert score_run(night / "free", "test", "best", init_distributed(), other_ids).predictions


def forget_vocabulary(run: Path) -> None:
    """Make the checkpoints of a run those of an earlier version."""
    for checkpoint in layout.checkpoints_by_step(run / "checkpoints"):
        file, marker = checkpoint / "extra.json", layout.read_marker(checkpoint)
        extra = json.loads(file.read_text())
        for key in (VOCABULARY, "dataset", "factors", "earlier_steps"):
            del extra[key]
        file.write_text(json.dumps(extra))
        marker["files"]["extra.json"] = [file.stat().st_size, sha256(file.read_bytes()).hexdigest()]
        marker.pop("sha256")
        (checkpoint / "COMPLETE").write_text(json.dumps(layout.with_checksum(marker)))


def test_an_earlier_run_loads_with_a_caution_and_can_be_adopted(
    night: Path, other_ids: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = shutil.copytree(night / "one", tmp_path / "old")
    forget_vocabulary(run)
    load_run(run, "best", init_distributed(), dataset=other_ids)
    assert "does not say which ids it was trained with" in caplog.text
    assert "40 of 40 ids kept" not in caplog.text
    marks = adopt(run, night / "data")  # its second version
    assert {name: mark.count for name, mark in marks.items()} == {
        "items": 40,
        "actions": 6,
        "feature/genres": 4,
        "feature/country": 3,
    }
    load_run(run, "best", init_distributed())
    with pytest.raises(ValueError, match="items: number 1 is 's39' here"):
        load_run(run, "best", init_distributed(), dataset=other_ids)
    with pytest.raises(ValueError, match="knows its ids already"):
        adopt(run, night / "data")


def test_a_dataset_with_fewer_ids_is_not_adopted(night: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    prepare_shop(folder)
    train(settings(night, "later", max_steps=1))
    run = shutil.copytree(night / "later", tmp_path / "later")
    forget_vocabulary(run)
    with pytest.raises(ValueError, match=r"was not trained on .*: items: 44 in the run, 40 in the dataset; name the"):
        adopt(run, folder / "data")


# ---------------------------------------------------------------------- factors


def test_factors_stay_those_of_the_run(night: Path) -> None:
    own = RunFactors.load(night / "factors")
    assert own is not None
    loaded = load_run(night / "factors", "best", init_distributed())
    vectors = loaded.experiment.item_vectors
    assert vectors is not None and len(vectors) == 41 + NEW_ITEMS
    np.testing.assert_array_equal(vectors[:41], own.vectors())
    following = train(settings(night, "factors-next", start_from=night / "factors", max_steps=1, **FACTORS))
    np.testing.assert_array_equal(following.experiment.item_vectors, vectors)
    kept = RunFactors.load(night / "factors-next")
    assert kept is not None and len(kept.model.bias) == 41 + NEW_ITEMS


def test_lost_or_replaced_factors_are_refused(night: Path, tmp_path: Path) -> None:
    run = shutil.copytree(night / "factors", tmp_path / "factors")
    RunFactors.fit(Dataset.open(night / "data")).save(run)
    with pytest.raises(ValueError, match="was trained with other item factors than the run's factors.npz: restore"):
        load_run(run, "best", init_distributed())
    (run / "factors.npz").unlink()
    with pytest.raises(ValueError, match="was trained with other item factors than the run's factors.npz: restore"):
        load_run(run, "best", init_distributed())
    with pytest.raises(ValueError, match=r"start_from: .* item factors that are not in .*: restore its factors\.npz"):
        build(settings(night, "two", start_from=run, **FACTORS))
    (run / "factors.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"factors\.npz cannot be read .*; restore it from a copy of the run"):
        load_run(run, "best", init_distributed())


# ---------------------------------------------------------------------- rows of new ids


@pytest.mark.parametrize("text", [False, True])
def test_rows_of_new_ids_start_from_the_unknown_one_or_from_neighbors(night: Path, text: bool) -> None:
    source = {"start_from": night / "one"}
    if text:
        train(settings(night, "text", max_steps=2, item_llm__enabled=True, data__version=1))
        source = {"start_from": night / "text", "item_llm__enabled": True}
    noise = build(settings(night, "two", **source))
    unknown = build(settings(night, "two", features__new_rows="unknown", **source))
    for name, more in (("item_id", NEW_ITEMS), ("genres", 1), ("country", 1)):
        table = rows(unknown, name)
        assert torch.equal(table[:-more], rows(noise, name)[:-more])
        assert torch.equal(table[-more:], table[:1].expand(more, -1))
        assert not torch.equal(table, rows(noise, name))
        ema = unknown.ema.state_dict().get(f"{TABLES}{name}.weight")
        assert ema is None or torch.equal(ema, table)
    near = rows(build(settings(night, "two", features__new_rows="neighbors", **source)), "item_id")
    assert torch.equal(near[:-NEW_ITEMS], rows(noise, "item_id")[:-NEW_ITEMS])
    low, high = near[1:-NEW_ITEMS].min(0).values, near[1:-NEW_ITEMS].max(0).values
    assert ((near[-NEW_ITEMS:] >= low) & (near[-NEW_ITEMS:] <= high)).all()
    # Without texts, the last item has neighbors by its genre only, which no known item has.
    assert torch.allclose(near[-1], near[0]) == (not text) and not torch.equal(near[-NEW_ITEMS], near[0])
    assert not torch.equal(near[-1], rows(noise, "item_id")[-1])


def shards_on_rank(settings: Config) -> list[tuple[str, torch.Tensor, int, int]]:
    """(name, values, first row, first column) of this rank's shards of tables, and of Adagrad's sums."""
    trainer, found = build(settings), []
    for key, value in trainer.model.state_dict().items():
        if TABLES in key:
            found += [(key, *shard) for shard in local_shards(value)]
    for key, sums in trainer.table_optim.state().items():
        found += [(f"{key}.sum", *shard) for value in sums.values() for shard in local_shards(value)]
    return [(name, values.clone(), row, column) for name, values, row, column in found]


@pytest.mark.slow
@pytest.mark.parametrize("new_rows", ["unknown", "neighbors"])
def test_two_ranks_start_with_the_tables_of_one(night: Path, new_rows: str) -> None:
    options = {"start_from": night / "one", "start_from_optimizer": True, "features__new_rows": new_rows}
    whole = {name: values for name, values, _, _ in shards_on_rank(settings(night, "two", **options))}
    destroy_distributed()
    both = run_ranks(shards_on_rank, 2, settings(night, "two", **options))
    assert {name for rank in both for name, *_ in rank} == whole.keys()
    assert {name for name, *_ in both[0]} != {name for name, *_ in both[1]}
    for name, values, row, _ in [shard for rank in both for shard in rank]:
        torch.testing.assert_close(values, whole[name][row : row + len(values)], rtol=0, atol=1e-6)


def test_new_events_are_scored_by_the_command(night: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, output = str(night / "one"), night / "measured"
    options = ["--draws", "0", "--no-tensorboard"]
    assert evaluate(["--run-dir", run, "--dataset", str(night / "data"), "--output", str(output), *options]) == 0
    assert json.loads((output / "metrics.json").read_text())["provenance"]["dataset"]["version"] == 2
    assert evaluate(["--dataset", str(night / "data"), "--predictions", f"a={night / 'one'}", *options]) == 2
    assert "--dataset" in capfd.readouterr().err
    assert adopt_command(["--run", run, "--dataset", str(night / "data")]) == 2
    assert f"error: {run} knows its ids already; nothing to adopt" in capfd.readouterr().err


def test_a_run_is_adopted_by_the_command(night: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(night / "one", tmp_path / "old")
    forget_vocabulary(run)
    assert adopt_command(["--run", str(run), "--dataset", str(night / "data")]) == 0
    assert f"{run}: 40 items, 6 actions, 4 feature/genres, 3 feature/country" in capfd.readouterr().out
