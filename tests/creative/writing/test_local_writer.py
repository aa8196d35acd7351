"""`LocalWriter`: same answers as `generate` of transformers; texts of items are tokenized as plain text."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hllm_torchrec.creative.writing import local_writer
from hllm_torchrec.creative.writing.local_writer import LocalWriter, _batches
from hllm_torchrec.creative.writing.writer import Ask
from tests.helpers import creative_fixtures
from tests.helpers.creative_fixtures import tiny_model


def ask(prompt: str, **settings: float) -> Ask:
    return Ask("propose", "word2 word3", prompt, "u1", **{"max_tokens": 6, "temperature": 0.0, **settings})


@pytest.mark.parametrize("chat", [True, False])
def test_greedy_answers_are_those_of_transformers(chat: bool) -> None:
    writer = LocalWriter(str(tiny_model(chat)))
    model = AutoModelForCausalLM.from_pretrained(tiny_model(chat)).eval()
    asked = [ask("word4 word5 word6"), ask("word7")]
    answers = sorted(writer.write(asked), key=lambda answer: answer.index)
    for one, answer in zip(asked, answers, strict=True):
        ids = torch.tensor([writer.prompt_ids(one)])
        seen = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        whole = model.generate(ids, max_new_tokens=6, do_sample=False, **seen)[0, ids.shape[1] :]
        assert answer.text == writer.tokenizer.decode(whole, skip_special_tokens=True) and answer.text
        assert answer.tokens[0] == ids.shape[1]
    assert writer.name == f"llm:local-writer-{chat}" and not writer.leaves_machine


def test_special_tokens_in_an_item_are_text() -> None:
    writer = LocalWriter(str(tiny_model()))
    end, unknown = writer.tokenizer.eos_token_id, writer.tokenizer.unk_token_id
    plain, spelled = (writer.prompt_ids(ask(text)) for text in ("word4 word5", "word4 [END] word5"))
    assert plain.count(end) == 2  # of the template
    assert spelled.count(end) == 2 and spelled.count(unknown) > plain.count(unknown)


def test_sampling_depends_on_the_prompt_and_its_seed_alone() -> None:
    writer = LocalWriter(str(tiny_model()))
    hot = [ask(f"word{i}", temperature=2.0) for i in range(4)]
    hot[1] = ask("word1 word2 word3 word4 word5", temperature=2.0)
    hot.append(ask("word9", temperature=2.0, max_tokens=3))
    together = [answer.text for answer in sorted(writer.write(hot), key=lambda answer: answer.index)]
    assert together == [next(iter(writer.write([one]))).text for one in hot]
    others = [answer.text for answer in writer.write([ask(f"word{i}", temperature=2.0, seed=1) for i in range(4)])]
    assert others != together[:4]


def test_batches_are_of_similar_prompts_with_the_same_parameters_and_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_writer, "BATCH_PROMPTS", 2)
    asked = [ask("a"), ask("b", max_tokens=3), ask("c"), ask("d"), ask("e", temperature=1.0)]
    ids = [[0] * length for length in (5, 1, 9, 4, 2)]
    assert list(_batches(range(5), asked, ids)) == [[1], [3, 0], [2], [4]]
    assert list(_batches([0, 1, 2], [ask("a", max_tokens=9000)] * 3, ids)) == [[1], [0], [2]]


def test_a_prompt_that_does_not_fit_has_no_answer() -> None:
    long, short = LocalWriter(str(tiny_model())).write([ask("word4 " * 505), ask("word4")])
    assert (long.index, short.index) == (0, 1)
    assert long.text is None and "exceed 512 positions" in long.error and short.text is not None


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config.json; give a model's directory"):
        LocalWriter(str(tmp_path))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(creative_fixtures.tokenizer_dir())
    tokenizer.add_tokens([f"more{i}" for i in range(40)])
    shutil.copytree(tiny_model(), tmp_path / "grown")
    tokenizer.save_pretrained(tmp_path / "grown")
    with pytest.raises(ValueError, match=r"its tokenizer has \d+ tokens, its model 48: give the directory of a model"):
        LocalWriter(str(tmp_path / "grown"))
