"""A directory of sentence-transformers says how its vectors are made: it is followed, or the contradiction is said."""

import json
import logging
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.encoders import ItemLLMConfig
from hllm_torchrec.data.token_store import special_tokens, tokenize
from hllm_torchrec.launch import check_model
from hllm_torchrec.models.build import build_text_llm
from hllm_torchrec.models.text_format import check_saved_format, format_warnings, text_format
from tests.helpers import fixtures
from tests.helpers.fixtures import BERT, LLAMA, folder

WORDS = ["<pad>", "<s>", "</s>", "[UNK]", "title", ":", "red", "green", "blue", "shoes", "document", "|"]
BACKBONES = {"bert": BERT, "llama": LLAMA}
TRANSFORMER, POOLING, NORMALIZE = (
    {"path": path, "type": f"sentence_transformers.models.{kind}"}
    for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
)


@cache
def base(kind: str) -> Path:
    """A small model with a tokenizer that puts <s> before a text and </s> after it, as few decoders' do."""
    path = folder() / f"sentences-{kind}"
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(**BACKBONES[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="<pad>").save_pretrained(path)
    return path


def sentences(
    target: Path, kind: str, pooling: dict[str, Any], *more: dict[str, str], prompts: dict[str, Any] | None = None
) -> Path:
    """A directory of sentence-transformers."""
    shutil.copytree(base(kind), target)
    (target / "1_Pooling").mkdir()
    (target / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 24} | pooling))
    (target / "modules.json").write_text(json.dumps([TRANSFORMER, POOLING, *more]))
    if prompts is not None:
        (target / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return target


def section(path: Path, **options: Any) -> ItemLLMConfig:
    return replace(ItemLLMConfig(pretrained=str(path)), **options)


MODES = {
    "cls": ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
    "mean": ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
    "last": ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "last"),
    "new name": ({"pooling_mode": "lasttoken"}, "last"),
    "default": ({}, "mean"),
}


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("mode", MODES)
def test_embeddings_are_those_of_sentence_transformers(mode: str, kind: str, tmp_path: Path) -> None:
    """Of the whole tokenized text, pooled and scaled as its files say, by plain transformers."""
    facts, pooling = MODES[mode]
    prompts = {"prompts": {"query": "blue ", "document": "document | "}, "default_prompt_name": None}
    path = sentences(tmp_path / "m", kind, facts, NORMALIZE, prompts=prompts)
    form = text_format("item_llm", section(path))
    assert (form.pooling, form.normalize, form.causal) == (pooling, True, kind == "llama")
    assert form.prompt == "document | "
    model = build_text_llm("item_llm", section(path), trains=False)
    assert model is not None
    tokenizer, plain = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    texts = [form.prompt + text for text in ("title: red shoes", "blue", "title: green shoes | blue red")]
    ids = tokenize(tokenizer, texts, 12, form.keeps_end)
    with torch.no_grad():
        found = model.eval()(torch.tensor(sum(ids, [])), torch.tensor([0, *map(len, ids)]).cumsum(0))
        for row, text in zip(found, texts, strict=True):
            states = plain(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
            vector = {"cls": states[0], "mean": states.mean(0), "last": states[-1]}[pooling]
            torch.testing.assert_close(row, vector / vector.norm(), rtol=1e-4, atol=1e-4)


def test_lower_casing_that_the_tokenizer_does_not_do_is_said(tmp_path: Path) -> None:
    path = sentences(tmp_path / "m", "bert", {})
    file = path / "sentence_bert_config.json"
    for says, expected in ((False, 0), (True, 1)):
        file.write_text(json.dumps({"max_seq_length": 16, "do_lower_case": says}))
        said = [line for line in format_warnings("item_llm", section(path)) if "texts are lower-cased first" in line]
        assert len(said) == expected
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    tokenizer.save_pretrained(path)
    assert not list(format_warnings("item_llm", section(path)))


def test_a_directory_that_says_nothing_is_read_with_the_item_vector() -> None:
    form = text_format("item_llm", section(base("llama")))
    assert (form.pooling, form.normalize, form.prompt, form.keeps_end) == ("item", False, "", False)
    assert not list(format_warnings("item_llm", section(base("llama"))))


def test_an_option_that_contradicts_the_checkpoint_is_followed_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    path = sentences(tmp_path / "m", "bert", MODES["cls"][0], dense, NORMALIZE)
    asked = section(path, pooling="mean", causal=True)
    with caplog.at_level(logging.WARNING):
        model = build_text_llm("item_llm", asked, trains=False)
    assert model is not None and (model.pooling, model.causal, model.normalize) == ("mean", True, False)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("hllm_torchrec")]
    assert len(said) == 3
    assert "item_llm.causal: true, though" in said[0] and "in both directions" in said[0]
    assert "item_llm.pooling: mean, though" in said[1] and "1_Pooling/config.json says cls_token" in said[1]
    assert "its layers after the pooling (2_Dense) are left out" in said[2]


@pytest.mark.parametrize(
    ("facts", "prompts", "message"),
    [
        ({"pooling_mode_max_tokens": True}, None, r"pooling: null: .*1_Pooling/config\.json says 'max_tokens', .*name"),
        (
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            None,
            r"says 'cls_token \+ mean_tokens', which is not one of item, mean, cls, last; name one",
        ),
        (
            {"pooling_mode_mean_tokens": True, "include_prompt": False},
            {"prompts": {"document": "x"}},
            r'item_llm\.prompt: .x.: .* leaves the prompt out of the mean, .* write prompt: ""',
        ),
    ],
)
def test_a_pooling_that_is_not_here_is_refused(
    facts: dict[str, Any], prompts: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        text_format("item_llm", section(sentences(tmp_path / "m", "bert", facts, prompts=prompts)))


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("modules.json", "{"),
        ("modules.json", "{}"),
        ("modules.json", "[1]"),
        ("modules.json", json.dumps([TRANSFORMER, POOLING | {"path": "../1_Pooling"}])),
        ("modules.json", json.dumps([TRANSFORMER, POOLING | {"path": "9_Pooling"}])),
        ("1_Pooling/config.json", "[]"),
        ("config_sentence_transformers.json", '{"prompts": {"document": 3}}'),
        ("config_sentence_transformers.json", '{"prompts": 3}'),
    ],
)
def test_damaged_files_are_refused_by_their_name(name: str, contents: str, tmp_path: Path) -> None:
    path = sentences(tmp_path / "m", "bert", {}, prompts={})
    (path / name).write_text(contents)
    with pytest.raises(ValueError, match=r"m/\S+\.json\b.*; fetch the directory again") as refused:
        text_format("item_llm", section(path))
    assert "\n" not in str(refused.value)


def test_a_resumed_run_keeps_reading_as_it_was_trained(tmp_path: Path) -> None:
    """Runs of before had no null: their options say item and causal, whatever the checkpoint says."""
    path = sentences(tmp_path / "m", "bert", MODES["cls"][0])
    before = {"item_llm": {"pooling": "item", "causal": True, "prompt": ""}}
    config = replace(fixtures.config(), item_llm=section(path))
    with pytest.raises(ConfigError) as refused:
        check_saved_format(before, config, Path("runs/old/checkpoints/step-4"))
    assert len(refused.value.problems) == 2
    assert "item_llm.pooling: null, which means 'cls' here: runs/old" in refused.value.problems[0]
    assert refused.value.problems[0].endswith('write item_llm.pooling: "item"')
    followed = replace(config, item_llm=section(path, pooling="item", causal=True))
    check_saved_format(before, followed, Path("runs/old/checkpoints/step-4"))


def test_special_tokens_are_found_with_a_vocabulary_without_common_words() -> None:
    tokenizer = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "xylem": 2}))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert special_tokens(fast) == ([0], [])
    assert special_tokens(fast, keep_end=True) == ([0], [1])
    with pytest.raises(ValueError, match=r"its tokenizer: .*UNK.*; give one that has a token for unknown words"):
        tokenize(fast, ["xylem phloem"], 5)


def test_check_model_prints_how_a_model_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sentences(tmp_path / "m", "bert", MODES["cls"][0], NORMALIZE)
    assert check_model.main(["--model", str(path), "--max-text-length", "20"]) == 0
    said = capsys.readouterr().out
    assert "bert: 2 layers, 24 wide" in said and "reads in both directions; texts packed" in said
    assert "pooling cls, scaled to length 1; prompt ''; special tokens after a text: kept" in said
    assert "10 texts encoded together and by plain transformers one at a time differ by" in said
    AutoModel.from_config(AutoConfig.for_model(**BERT | {"max_position_embeddings": 6})).save_pretrained(path)
    assert check_model.main(["--model", str(path)]) == 0  # its texts are cut to the positions that the model has
    capsys.readouterr()
    assert check_model.main(["--model", str(tmp_path)]) == 2
    assert f"check-model: error: {tmp_path}/config.json: FileNotFoundError" in capsys.readouterr().err
