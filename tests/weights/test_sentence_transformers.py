"""The exported Item LLM read by sentence-transformers gives the run's item embeddings."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.run_loader import load_run
from hllm_torchrec.launch import export_hf
from hllm_torchrec.models.model_files import trained_item_token
from hllm_torchrec.models.text_format import sentence_format
from hllm_torchrec.weights.sentence_transformers import write_sentence_transformers
from tests.helpers import fixtures
from tests.helpers.training_fixtures import config, train


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def exported(folder: Path, **options: Any) -> tuple[Tensor, Path]:
    """Embeddings [N, E] of a run's items, and the folder of its export."""
    run, output = folder / "run", folder / "model"
    train(config(run, max_steps=2, item_llm__max_text_length=6, **options))
    ours = load_run(run, "best", init_distributed()).experiment.encode_catalogue()
    destroy_distributed()
    assert ours is not None
    assert export_hf.main(["--run", str(run), "--output", str(output)]) == 0
    return ours, output


def texts() -> list[str]:
    rows = fixtures.dataset().text(["title", "brand"]).to_pylist()
    return [", ".join(f"{key}: {value}" for key, value in row.items() if value) for row in rows]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"item_llm__pooling": "mean", "item_llm__normalize": True},
        {"item_llm__pooling": "last", "item_llm__prompt": "kettle ", "item_llm__causal": False},
    ],
    ids=["item", "mean", "last"],
)
def test_sentence_transformers_computes_the_runs_item_embeddings(tmp_path: Path, options: dict[str, Any]) -> None:
    package = pytest.importorskip("sentence_transformers", reason="pip install 'hllm_torchrec[sentences]'")
    ours, output = exported(tmp_path, **options)
    model = package.SentenceTransformer(str(output / "sentence_transformers"), device="cpu")
    rows = [number for number, text in enumerate(texts()) if text]
    theirs = model.encode([texts()[number] for number in rows], convert_to_tensor=True)
    torch.testing.assert_close(theirs, ours[torch.tensor(rows) + 1], rtol=1e-3, atol=1e-5)


def test_the_directory_says_pooling_length_prompt_and_normalization(tmp_path: Path) -> None:
    _, output = exported(tmp_path, item_llm__pooling="mean", item_llm__normalize=True, item_llm__prompt="kettle ")
    found = sentence_format(output / "sentence_transformers")
    assert found is not None and (found.pooling, found.normalize, found.prompt) == ("mean", True, "kettle ")
    length = json.loads((output / "sentence_transformers" / "sentence_bert_config.json").read_text())
    assert length["max_seq_length"] == 6
    assert "SentenceTransformer(" in (output / "README.md").read_text()


def test_a_tokenizer_that_cannot_take_the_item_token_is_left_out_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(fixtures.tokenizer_dir())
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ITEM]"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    _, output = exported(tmp_path, item_llm__tokenizer=tmp_path / "tokenizer")
    assert not (output / "sentence_transformers").exists() and (output / "item_llm" / "config.json").is_file()
    reason = "the tokenizer already has a token [ITEM]"
    assert f"no directory for sentence-transformers: {reason}" in capsys.readouterr().out
    assert f"None for this model: {reason}." in (output / "README.md").read_text()


def test_files_that_give_other_embeddings_are_refused(tmp_path: Path) -> None:
    _, output = exported(tmp_path)
    loaded = load_run(tmp_path / "run", "best", init_distributed())
    token = trained_item_token(str(output / "item_llm"), 16)
    with pytest.raises(ArgumentError, match="computes other embeddings than the run: they differ by"):
        write_sentence_transformers(loaded.experiment, output / "item_llm", token + 1, tmp_path / "other")
    assert not (tmp_path / "other").exists()
