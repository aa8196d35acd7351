"""The embedding job: what the model says, only what has changed, on any number of ranks."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from hllm_torchrec.distributed import coordination
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.inference import item_embedding
from hllm_torchrec.inference.item_embedding import EmbedReport, embed_items, item_content_hashes
from hllm_torchrec.launch.embed import main
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.stored_items import use_stored_items
from hllm_torchrec.store import EmbeddingStore
from hllm_torchrec.store.segment import SegmentWriter
from tests.helpers import fixtures
from tests.helpers.distributed import RankFailed, run_ranks
from tests.helpers.training_fixtures import config, train

RAW_IDS = fixtures.dataset().items["raw_item_id"].to_pylist()


@pytest.fixture(autouse=True)
def own_process_group() -> Any:
    yield
    destroy_distributed()


def build(tmp_path: Path, **options: Any) -> Experiment:
    return build_experiment(config(tmp_path / "run", **options), init_distributed())


def test_every_item_has_the_vector_that_the_model_gives_it(tmp_path: Path) -> None:
    experiment = build(tmp_path)
    report = embed_items(experiment, tmp_path / "s", "fp32")
    assert (report.items, report.encoded) == (len(RAW_IDS), len(RAW_IDS))
    found, known = EmbeddingStore.open(tmp_path / "s").snapshot().gather(RAW_IDS)
    assert known.all()
    torch.testing.assert_close(found, experiment.encode_catalogue()[1:], atol=1e-6, rtol=0)


def test_in_bfloat16_on_a_cpu_layers_run_fused_and_give_the_same_vectors(tmp_path: Path) -> None:
    experiment = build(tmp_path, **{"parallel.precision": "bf16"})
    layer = experiment.hllm.item_llm.blocks()[0]  # type: ignore[union-attr]
    with item_embedding.fast_products(experiment):
        assert "forward" in vars(layer)
    embed_items(experiment, tmp_path / "s", "fp32")
    assert "forward" not in vars(layer)
    found, _ = EmbeddingStore.open(tmp_path / "s").snapshot().gather(RAW_IDS)
    assert torch.cosine_similarity(found, experiment.encode_catalogue()[1:]).min() > 0.999


def test_keys_are_numbers_where_the_raw_ids_are(tmp_path: Path) -> None:
    experiment = build(tmp_path)
    with pytest.raises(ValueError, match="keys int64: raw id 's0' is not an int64 .*: use keys of type str"):
        embed_items(experiment, tmp_path / "s", "fp32", "int64")
    assert not (tmp_path / "s").exists()
    numbers = [7 * 10**17 + 13 * i if i % 2 else -i for i in range(len(RAW_IDS))]
    raw = pa.chunked_array([[str(number) for number in numbers]])
    table = experiment.dataset.items
    experiment.dataset.__dict__["items"] = table.set_column(table.column_names.index("raw_item_id"), "raw_item_id", raw)
    try:
        assert embed_items(experiment, tmp_path / "s", "fp32", "int64").encoded == len(RAW_IDS)
        assert embed_items(experiment, tmp_path / "s").encoded == 0  # the store's own keys
        found, known = EmbeddingStore.open(tmp_path / "s").snapshot().gather(torch.tensor(numbers))
        assert known.all()
        torch.testing.assert_close(found, experiment.encode_catalogue()[1:], atol=1e-6, rtol=0)
        with pytest.raises(ValueError, match="its keys are of type int64, not string: embed into a new store"):
            embed_items(experiment, tmp_path / "s", "fp32", "string")
        use_stored_items(experiment, str(tmp_path / "s"))
        torch.testing.assert_close(experiment.encode_catalogue()[1:], found, atol=1e-2, rtol=1e-2)  # fp16
    finally:
        experiment.dataset.__dict__["items"] = table


def test_a_job_in_many_commits_equals_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = build(tmp_path)
    embed_items(experiment, tmp_path / "one", "fp32")
    monkeypatch.setattr(item_embedding, "CATALOGUE_TOKENS", 40)
    monkeypatch.setattr(item_embedding, "COMMIT_TOKENS", 90)
    report = embed_items(experiment, tmp_path / "many", "fp32")
    assert report.version > 3
    one, many = (EmbeddingStore.open(tmp_path / name).snapshot().gather(RAW_IDS)[0] for name in ("one", "many"))
    torch.testing.assert_close(many, one, atol=1e-6, rtol=0)


def test_only_new_and_changed_items_are_encoded(tmp_path: Path) -> None:
    experiment = build(tmp_path)
    embed_items(experiment, tmp_path / "s")
    assert embed_items(experiment, tmp_path / "s").encoded == 0
    store = EmbeddingStore.open(tmp_path / "s")
    before, _ = store.snapshot().gather(RAW_IDS)
    with store.writer() as writer:  # as if two texts had been others, and an item new
        writer.upsert(RAW_IDS[3:5], torch.zeros(2, store.width), np.array([1, 2], np.uint64))
        writer.delete(RAW_IDS[7:8])
        writer.commit()
    assert embed_items(experiment, tmp_path / "s").encoded == 3
    torch.testing.assert_close(store.snapshot().gather(RAW_IDS)[0], before, atol=1e-3, rtol=0)


def test_a_mark_follows_the_text_of_its_item_alone() -> None:
    tokens = fixtures.token_store()
    marks = item_content_hashes(tokens)
    assert marks.dtype == np.uint64 and marks.size == len(tokens)
    texts = [tuple(tokens.gather(np.array([i]))[0].tolist()) for i in range(len(tokens))]
    assert len(set(texts)) == np.unique(marks).size
    assert all((texts[i] == texts[j]) == (marks[i] == marks[j]) for i in range(20) for j in range(20))


def embed_on_ranks(tmp_path: Path) -> EmbedReport:
    return embed_items(build(tmp_path), tmp_path / "two", "fp32")


@pytest.mark.slow
def test_two_ranks_write_what_one_does(tmp_path: Path) -> None:
    embed_items(build(tmp_path), tmp_path / "one", "fp32")
    destroy_distributed()
    reports = run_ranks(embed_on_ranks, 2, tmp_path)
    assert [report.encoded for report in reports] == [len(RAW_IDS)] * 2
    store = EmbeddingStore.open(tmp_path / "two")
    assert len(store.snapshot().segments) == 2 and all(run.facts.rows for run in store.snapshot().segments)
    found, known = store.snapshot().gather(RAW_IDS)
    assert known.all()
    torch.testing.assert_close(
        found, EmbeddingStore.open(tmp_path / "one").snapshot().gather(RAW_IDS)[0], atol=1e-5, rtol=0
    )


def embed_in_small_commits(tmp_path: Path, die_after: int = 0) -> EmbedReport:
    """On each rank; rank 1 is killed when it has written so many runs, in the middle of a round."""
    item_embedding.CATALOGUE_TOKENS, item_embedding.COMMIT_TOKENS = 20, 40
    experiment, written = build(tmp_path), []
    add = SegmentWriter.add

    def add_or_die(run: SegmentWriter, *row: Any) -> None:
        add(run, *row)
        written.append(run.name)
        if die_after and coordination.rank() == 1 and len(set(written)) > die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentWriter, "add", add_or_die)
        return embed_items(experiment, tmp_path / "two", "fp32")


@pytest.mark.slow
def test_a_job_whose_rank_is_killed_continues_when_it_is_started_again(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="rank 1 of 2 died without a traceback"):
        run_ranks(embed_in_small_commits, 2, tmp_path, 3)
    store = EmbeddingStore.open(tmp_path / "two")
    done = len(store.snapshot())
    assert 0 < done < len(RAW_IDS) and store.verify() == [] and store.snapshot().version == 3
    assert len(list((tmp_path / "two" / "runs").iterdir())) > len(store.snapshot().segments), "what the killed left"
    reports = run_ranks(embed_in_small_commits, 2, tmp_path)
    assert [report.encoded for report in reports] == [len(RAW_IDS) - done] * 2
    assert len(list((tmp_path / "two" / "runs").iterdir())) == len(store.snapshot().segments)
    found, known = store.snapshot().gather(RAW_IDS)
    assert known.all()
    torch.testing.assert_close(found, build(tmp_path).encode_catalogue()[1:], atol=1e-5, rtol=0)


def test_a_store_of_other_weights_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    embed_items(build(tmp_path), tmp_path / "s")
    before = (tmp_path / "s" / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match=r"made by another model \(weights differ\)"):
        embed_items(build(tmp_path, seed=1), tmp_path / "s")
    with pytest.raises(ValueError, match=r"another model \(.*max_text_length.* differ\)"):
        embed_items(build(tmp_path, item_llm__max_text_length=5), tmp_path / "s")
    assert (tmp_path / "s" / "manifest.json").read_bytes() == before


def test_a_model_of_ids_has_nothing_to_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="item_llm.enabled: false: a model without an Item LLM"):
        embed_items(build(tmp_path, item_llm__enabled=False), tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_the_command_embeds_a_run_and_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(tmp_path / "run"))
    destroy_distributed()
    capsys.readouterr()
    command = ["--run", str(tmp_path / "run"), "--items", str(tmp_path / "s")]
    assert main(command) == 0
    assert f"embedded {len(RAW_IDS)} of {len(RAW_IDS)} items in " in capsys.readouterr().out
    assert main(command) == 0
    assert f"embedded 0 of {len(RAW_IDS)} items in " in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert main(command) == 2
    assert capsys.readouterr().err.count("\n") == 1
