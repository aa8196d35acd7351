"""An exported run is what plain transformers reads, and what the run itself computes."""

import contextlib
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hllm_torchrec.config.loading import config_from_file
from hllm_torchrec.data.creative_tokens import CreativeTokenizer
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.creative_scores import CreativeVectors, creative_vectors, score_creatives
from hllm_torchrec.evaluation.run_loader import load_run
from hllm_torchrec.launch import export_hf
from hllm_torchrec.models.build import build_creative_llm, build_user_encoder
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.model_files import trained_item_token
from hllm_torchrec.models.text_format import TextFormat
from hllm_torchrec.modules.creative.decode import DecodeOptions, decode
from hllm_torchrec.weights.export import _metrics, _plain
from tests.helpers import creative_fixtures, fixtures
from tests.helpers.training_fixtures import config, train


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


@cache
def exported() -> tuple[Path, Path]:
    """A run with averaged weights and tables, and its export."""
    run, output = fixtures.folder() / "to-export" / "run", fixtures.folder() / "to-export" / "model"
    train(config(run, objective__fusion="late", optim__ema=0.5, features__init_scale=0.3))
    destroy_distributed()
    assert export_hf.main(["--run", str(run), "--output", str(output)]) == 0
    return run, output


@pytest.mark.slow
def test_plain_transformers_computes_the_runs_item_embeddings() -> None:
    run, output = exported()
    loaded = load_run(run, "best", init_distributed())
    with loaded.weights:
        ours = loaded.experiment.encode_catalogue()
    assert ours is not None
    model, tokenizer = (kind.from_pretrained(output / "item_llm") for kind in (AutoModel, AutoTokenizer))
    token = load_file(output / "item_llm" / "item_token.safetensors")["item_token"]
    rows = fixtures.dataset().text(["title", "brand"]).to_pylist()
    for number in (0, 3, 11):  # item 4 has no text
        text = ", ".join(f"{key}: {value}" for key, value in rows[number].items() if value)
        ids = torch.tensor(tokenizer(text)["input_ids"][:12], dtype=torch.long)
        with torch.no_grad():
            inputs = torch.cat([model.get_input_embeddings()(ids), token[None]])
            theirs = model(inputs_embeds=inputs[None]).last_hidden_state[0, -1]
        torch.testing.assert_close(ours[number + 1], theirs, rtol=1e-4, atol=1e-5)


def test_the_user_llm_reads_vectors_as_the_runs_own_does() -> None:
    run, output = exported()
    loaded = load_run(run, "best", init_distributed())
    vectors = torch.randn(5, loaded.experiment.hllm.user.width)
    with loaded.weights, torch.no_grad():
        ours, _ = loaded.experiment.hllm.user.eval()(vectors, torch.tensor([0, 5]))
        theirs = AutoModel.from_pretrained(output / "user_llm")(inputs_embeds=vectors[None]).last_hidden_state[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_everything_else_is_in_the_parts_with_the_averaged_weights() -> None:
    run, output = exported()
    parts = load_file(output / "parts.safetensors")
    loaded = load_run(run, "best", init_distributed())
    with loaded.weights:
        head = {f"head.{name}": value for name, value in loaded.experiment.hllm.head.state_dict().items()}
        for name, value in head.items():
            assert torch.equal(parts[name], value), name
    tables = [name for name in parts if ".embedding_bags." in name]
    assert {"item_id", "time_year"} <= {name.split(".")[-2] for name in tables}
    assert not any(name.startswith(("item_llm.", "user.")) for name in parts)


def test_another_run_can_begin_with_the_export() -> None:
    _, output = exported()
    onward = config_from_file(output / "config.yaml")
    assert onward.item_llm.pretrained == str(output / "item_llm")
    assert trained_item_token(onward.item_llm.pretrained, 16) is not None
    user = build_user_encoder(onward.user)
    assert torch.equal(user.backbone.norm.weight, load_file(output / "user_llm" / "model.safetensors")["norm.weight"])


def test_the_model_card_says_what_it_is_and_how_to_read_it() -> None:
    _, output = exported()
    card = (output / "README.md").read_text()
    assert "library_name: transformers" in card and "tiny-shop" in card
    assert "Not evaluated yet" in card and "item_token.safetensors" in card


def test_the_card_reads_the_item_vector_only_with_pooling_item() -> None:
    assert "item_token" in _plain(TextFormat("item", False, True, "", False))
    assert _plain(TextFormat("mean", True, False, "", False)) == (
        "The embedding is the mean of `last_hidden_state` for an item's text. Divide it by its length.\n"
    )
    assert _plain(None) == "None: the model has no Item LLM.\n"


def test_metrics_that_are_undefined_are_left_out_of_the_card(tmp_path: Path) -> None:
    found = {"models": {"one class": {"auc": None}, "run": {"auc": 0.75}}, "retrieval": {"ndcg@5": None, "mrr": 0.1}}
    (tmp_path / "metrics.json").write_text(json.dumps(found))
    assert _metrics(tmp_path) == "On the evaluated part:\n\n- run: AUC 0.7500"


def test_a_folder_that_is_there_is_not_touched(capsys: pytest.CaptureFixture[str]) -> None:
    run, output = exported()
    before = sorted(path.name for path in output.iterdir())
    assert export_hf.main(["--run", str(run), "--output", str(output)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert sorted(path.name for path in output.iterdir()) == before


@pytest.mark.slow
def test_the_creative_llm_scores_as_a_causal_model_of_transformers_and_is_read_again(tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "model"
    train(config(run, **creative_fixtures.settings(creative__lora__rank=2, creative__losses__match="0")))
    destroy_distributed()
    assert export_hf.main(["--run", str(run), "--output", str(output)]) == 0
    experiment = load_run(run, "best", init_distributed()).experiment
    known = creative_vectors(experiment, "test")
    scores = score_creatives(experiment, "test", ("right",), vectors=known)
    theirs = AutoModelForCausalLM.from_pretrained(output / "creative_llm")
    parts = {
        name.removeprefix("creative_head.soft_prompt."): value
        for name, value in load_file(output / "parts.safetensors").items()
        if name.startswith("creative_head.")
    }
    soft = experiment.hllm.creative_head.soft_prompt
    assert all(torch.equal(value, parts[name]) for name, value in soft.state_dict().items())
    texts = known.loader.tokens.gather(np.arange(3))
    with torch.no_grad():
        tokens = soft(known.vectors[:3], torch.from_numpy(~known.known[:3]))
        for n, ids in enumerate(texts.token_ids.split(texts.cu_seqlens.diff().tolist())):
            words = theirs.get_input_embeddings()(torch.cat([texts.prefix_ids, ids]))
            at, first = texts.prefix_ids.numel() + int(texts.soft_at[n]), int(texts.response_from[n])
            logits = theirs(inputs_embeds=torch.cat([words[:at], tokens[n], words[at:]])[None]).logits[0]
            response = ids[first:]
            found = logits.log_softmax(-1)[-response.numel() - 1 : -1].gather(1, response[:, None])
            assert float(-found.sum()) == pytest.approx(scores.nll["right"][n], rel=1e-4)
    _check_card((output / "README.md").read_text(), output, known, experiment)
    section = config_from_file(output / "config.yaml").creative
    assert section.pretrained == str(output / "creative_llm") and section.lora.rank == 0
    again = build_creative_llm(section)
    torch.testing.assert_close(again.head_weight, theirs.lm_head.weight)


def _check_card(card: str, output: Path, known: CreativeVectors, experiment: Experiment) -> None:
    """The card says where the texts come from, and its lines of Python write what the library writes."""
    assert "made by a rule from the history" in card and "table lines" in card and "users of one part" in card
    code = re.search(r"```python\n(import torch\n[^`]*creative_llm.*?)```", card, re.DOTALL)[1]
    row = int(np.flatnonzero(known.known)[0])
    loader = known.loader
    item = int(loader.part.item_ids[loader.tokens.rows[row]])
    texts = experiment.dataset.text(["title", "brand"]).slice(item - 1, 1).to_pylist()[0]
    prompt = creative_fixtures.PROMPT.replace("{title}", texts["title"]).replace("{brand}", texts["brand"])
    names = {"user": known.vectors[row], "prompt": prompt}
    section, hllm = experiment.config.creative, experiment.hllm.eval()
    asked = CreativeTokenizer(section).prompts({name: [text] for name, text in texts.items()}, 1)[0]
    options = DecodeOptions(CreativeTokenizer(section).end, section.max_response_length)
    with contextlib.chdir(output), torch.no_grad():
        exec(code, names)
        rows = names["rows"][None]
        ids = names["writer"].generate(inputs_embeds=rows, max_new_tokens=options.most, do_sample=False)[0].tolist()
        soft = hllm.creative_head.soft_prompt(known.vectors[row : row + 1], torch.tensor([False]))
        ours = decode(hllm.creative, torch.tensor(asked.before), torch.tensor(asked.after), soft, options)
    tokens = [token for token in ours.tokens[0].tolist() if token >= 0]
    assert tokens and ids[: len(tokens)] == tokens
