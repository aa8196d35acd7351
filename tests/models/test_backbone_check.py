"""Foreign models give the embeddings of plain transformers, or are refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from hllm_torchrec.models.backbone_check import _kept_text_reading, check_user_backbone, text_reading
from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.models.small_models import is_causal
from hllm_torchrec.modules.encoders.backbone import TextReading
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from hllm_torchrec.weights.huggingface import save_backbone
from tests.helpers.fixtures import BERT, LLAMA, enlarge

DECODER = {**LLAMA, "vocab_size": 40, "head_dim": 6, "max_position_embeddings": 32, "pad_token_id": 1}
ENCODER = {**BERT, "vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 1}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
MODERN = {"cls_token_id": 4, "sep_token_id": 5, "global_attn_every_n_layers": 2, "local_attention": 6}
GPT = {
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 40,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
# Name -> (shape, arrangement, direction); with windows that are shorter than the texts.
FOREIGN: dict[str, tuple[dict[str, Any], str, bool]] = {
    "bert": (ENCODER, "packed", False),
    "roberta": (ENCODER | {"model_type": "roberta"}, "packed", False),
    "xlm-roberta": (ENCODER | {"model_type": "xlm-roberta", "pad_token_id": 3}, "packed", False),
    "mpnet": (ENCODER | {"model_type": "mpnet"}, "padded", False),
    "megatron-bert": (ENCODER | {"model_type": "megatron-bert"}, "padded", False),
    "modernbert": (ENCODER | MODERN | {"model_type": "modernbert"}, "packed", False),
    "albert": (ENCODER | {"model_type": "albert", "embedding_size": 16}, "packed", False),
    "qwen3": (DECODER | {"model_type": "qwen3"}, "packed", True),
    "mistral": (DECODER | {"model_type": "mistral", "sliding_window": 4}, "packed", True),
    "gemma2": (DECODER | WINDOW | {"model_type": "gemma2", "attn_logit_softcapping": 0.5}, "packed", True),
    "gemma3": (DECODER | WINDOW | {"model_type": "gemma3_text"}, "packed", True),
    "embeddinggemma": (
        DECODER | WINDOW | {"model_type": "gemma3_text", "use_bidirectional_attention": True},
        "packed",
        False,
    ),
    "bidirectional llama": (DECODER | {"is_causal": False}, "packed", False),
    "stablelm": (DECODER | {"model_type": "stablelm"}, "padded", True),
    "gpt-oss": (
        DECODER | {"model_type": "gpt_oss", "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4},
        "padded",
        True,
    ),
    "bloom": ({"model_type": "bloom", "hidden_size": 24, "n_layer": 2, "n_head": 4, "vocab_size": 40}, "padded", True),
    "gpt2": (GPT | {"model_type": "gpt2"}, "packed", True),
}
TEXTS = [[11, 9, 8], [7], [12, 12, 30, 11, 15, 8, 33, 20, 31], [6, 10], [39, 5, 4, 9, 22, 23, 8, 7]]


def by_transformers(plain: Any, item: Tensor, text: list[int]) -> dict[str, Tensor]:
    """E of one text by every pooling, from the stock model on token ids."""
    ids = torch.tensor([text])
    states = plain(input_ids=ids).last_hidden_state[0]
    with_item = torch.cat([plain.get_input_embeddings()(ids)[0], item[None]])
    behind = plain(inputs_embeds=with_item[None]).last_hidden_state[0, -1]
    return {"mean": states.mean(0), "cls": states[0], "last": states[-1], "item": behind}


@pytest.mark.parametrize("name", FOREIGN)
def test_embeddings_are_those_of_plain_transformers(name: str) -> None:
    shape, arrangement, causal = FOREIGN[name]
    torch.manual_seed(0)
    backbone = enlarge(build_backbone(None, shape))
    plain = AutoModel.from_config(AutoConfig.for_model(**shape)).eval()
    plain.load_state_dict(backbone.state_dict(), strict=False)  # but for a pooler, which is not read
    words = torch.tensor([0, *map(len, TEXTS)]).cumsum(0)
    tokens = torch.tensor([token for text in TEXTS for token in text])
    for pooling in ("mean", "cls", "last", "item"):
        model = ItemLLM(backbone, pooling).eval()  # type: ignore[arg-type]
        assert (model.arrangement, model.causal) == (arrangement, causal)
        with torch.no_grad():
            found = model(tokens, words)
            expected = torch.stack([by_transformers(plain, model.item_token, text)[pooling] for text in TEXTS])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mpnet", "stablelm"])
def test_padded_texts_train_as_texts_that_are_read_alone(name: str) -> None:
    torch.manual_seed(0)
    model = ItemLLM(enlarge(build_backbone(None, FOREIGN[name][0])), "mean").eval()
    parts = [model(torch.tensor(text), torch.tensor([0, len(text)])) for text in TEXTS]
    offsets = torch.tensor([0, *map(len, TEXTS)]).cumsum(0)
    together = model(torch.tensor([token for text in TEXTS for token in text]), offsets)
    weights = torch.randn(together.shape)
    used = list(model.backbone.parameters())
    mine = torch.autograd.grad((together * weights).sum(), used, materialize_grads=True)
    alone = torch.autograd.grad((torch.cat(parts) * weights).sum(), used, materialize_grads=True)
    torch.testing.assert_close(mine, alone, rtol=1e-3, atol=1e-4)


def test_normalized_embeddings_have_length_1_and_the_same_direction() -> None:
    backbone = enlarge(build_backbone(None, ENCODER))
    ids, offsets = torch.tensor([9, 8, 7]), torch.tensor([0, 2, 3])
    plain, unit = (ItemLLM(backbone, "cls", normalize=n).eval()(ids, offsets) for n in (False, True))
    torch.testing.assert_close(unit, plain / plain.norm(dim=1, keepdim=True))


def test_a_direction_that_is_asked_for_is_that_of_transformers_switch() -> None:
    shape = ENCODER | {"is_decoder": True}
    assert is_causal(AutoConfig.for_model(**shape)) and not is_causal(AutoConfig.for_model(**ENCODER))
    torch.manual_seed(0)
    asked = enlarge(build_backbone(None, ENCODER, causal=True))
    plain = AutoModel.from_config(AutoConfig.for_model(**shape), add_pooling_layer=False).eval()
    plain.load_state_dict(asked.state_dict())
    model = ItemLLM(asked, "mean").eval()
    assert model.causal
    text = torch.tensor(TEXTS[2])
    expected = plain(input_ids=text[None]).last_hidden_state[0].mean(0)
    torch.testing.assert_close(model(text, torch.tensor([0, len(text)]))[0], expected, rtol=1e-4, atol=1e-4)


REFUSED = {
    "two stacks": (
        {"model_type": "t5", "d_model": 16, "num_layers": 2},
        None,
        "t5: transformers does not run it on text",
    ),
    "no switch": (FOREIGN["mpnet"][0], True, "causal: True: mpnet reads with causal: False, .*; leave the option out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(case: str) -> None:
    shape, causal, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as refused:
        text_reading(AutoConfig.for_model(**shape), causal)
    assert "\n" not in str(refused.value)


def test_a_shape_that_is_no_model_is_refused_in_one_line() -> None:
    for wrong in ({"num_attention_heads": 5}, {"model_type": "lama"}, {"num_hidden_layers": 10**7}, {"vocab_size": 0}):
        with pytest.raises(ValueError, match=r"^shape: .*: give a config that transformers knows$") as refused:
            build_backbone(None, LLAMA | wrong)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3", "bert", "gpt2"])
def test_these_can_be_a_user_llm(name: str) -> None:
    check_user_backbone(AutoConfig.for_model(**FOREIGN[name][0]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mpnet", "reads in both directions"),
        ("roberta", "values differ by"),
        ("bloom", "values differ by"),
        ("gemma2", "caps its attention logits"),
        ("gpt-oss", "attention sinks"),
        ("stablelm", "hllm_plan"),
    ],
)
def test_these_cannot_be_a_user_llm_and_the_message_says_why(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"as User LLM: .*{reason}.*: choose a decoder such as Llama"):
        build_backbone(None, FOREIGN[name][0], word_embeddings=False)


def test_the_check_leaves_random_numbers_alone_and_runs_once() -> None:
    config = AutoConfig.for_model(**(LLAMA | {"rms_norm_eps": 3e-6}))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with torch.no_grad(), torch.device("meta"):
        text_reading(config)
    assert torch.equal(before, torch.get_rng_state())
    misses = _kept_text_reading.cache_info().misses
    text_reading(config)
    assert _kept_text_reading.cache_info().misses == misses


def test_a_check_that_passed_is_kept_on_disk_and_a_damaged_one_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HLLM_CACHE", str(tmp_path))
    config = AutoConfig.for_model(**(LLAMA | {"rms_norm_eps": 4e-6}))

    def fresh() -> TextReading:
        _kept_text_reading.cache_clear()
        return text_reading(config)

    found = fresh()
    (file,) = tmp_path.rglob("*.json")
    assert fresh() == found == TextReading("packed", True)
    file.write_text(json.dumps({"arrangement": "padded", "causal": True}))
    assert fresh().arrangement == "padded"  # it is read, not made again
    for damaged in ('{"arrangement"', "[]", "{}"):
        file.write_text(damaged)
        assert fresh() == found
    tmp_path.chmod(0o500)
    check_user_backbone(config)
    bad = AutoConfig.for_model(**(ENCODER | {"model_type": "deberta-v2"}))
    for _ in range(2):
        with pytest.raises(ValueError, match="deberta-v2 as User LLM"):
            check_user_backbone(bad)
    tmp_path.chmod(0o700)


def test_a_model_that_cannot_be_packed_is_exported_as_a_directory_of_transformers(tmp_path: Path) -> None:
    model = build_backbone(None, FOREIGN["mpnet"][0])
    (tmp_path / "m").mkdir()
    save_backbone(model.config, model.state_dict(), tmp_path / "m")
    again = AutoModel.from_pretrained(tmp_path / "m").state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())


def test_texts_that_end_with_the_prompt_do_not_share_it_if_their_last_token_is_read() -> None:
    llm = ItemLLM(build_backbone(None, DECODER), "last")
    assert not llm.shares_prefix and ItemLLM(llm.backbone, "item").shares_prefix
    with pytest.raises(ValueError, match="another pooling than last .*; give complete texts"):
        llm(torch.tensor([9]), torch.tensor([0, 0, 1]), torch.tensor([7, 8]))


def test_layers_that_are_kept_keep_their_kinds() -> None:
    shape = FOREIGN["gemma3"][0] | {"num_hidden_layers": 3, "layer_types": [*WINDOW["layer_types"], "full_attention"]}
    model = build_backbone(None, shape, layers=2)
    assert model.config.layer_types == WINDOW["layer_types"] and len(model.layers) == 2


@pytest.mark.parametrize("kind", ["albert", "electra"])
def test_a_user_llm_reads_vectors_of_the_width_that_it_writes(kind: str) -> None:
    shape = ENCODER | {"model_type": kind, "embedding_size": 16}
    with pytest.raises(ValueError, match="reads vectors of another width than it writes: give its emb"):
        build_backbone(None, shape, word_embeddings=False)
    build_backbone(None, shape | {"embedding_size": ENCODER["hidden_size"]}, word_embeddings=False)


def test_windows_that_the_switch_of_direction_does_not_reach_are_no_user_llm() -> None:
    shape = ENCODER | MODERN | {"model_type": "modernbert", "local_attention": 128}
    with pytest.raises(ValueError, match="modernbert as User LLM: .*sees later positions within its windows"):
        build_backbone(None, shape, word_embeddings=False)
    build_backbone(None, shape | {"global_attn_every_n_layers": 1}, word_embeddings=False)
