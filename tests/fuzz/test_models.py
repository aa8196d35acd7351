"""Fuzz: random tiny architectures give the states of plain transformers, or are refused with a remedy."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.models.small_models import directed
from hllm_torchrec.modules.encoders.base import Queries
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from hllm_torchrec.modules.encoders.user_llm import UserLLM
from tests.fuzz.mutations import FEWER, REMEDIES, Target
from tests.helpers.fixtures import enlarge

Draw = np.random.Generator
VOCABULARY = 60
FAR = 2e-3
"""Largest difference relative to the largest value, of enlarged weights in float32."""


def _layers(rng: Draw, *kinds: str) -> dict[str, Any]:
    return {"layer_types": [str(rng.choice(kinds)) for _ in range(3)], "sliding_window": int(rng.integers(2, 9))}


def _rope(rng: Draw) -> dict[str, Any]:
    kind = str(rng.choice(["default", "linear", "dynamic", "yarn"]))
    return {"rope_parameters": {"rope_type": kind, "rope_theta": float(rng.choice([100.0, 10_000.0])), "factor": 2.0}}


def _cap(rng: Draw) -> float | None:
    return None if rng.random() < 0.5 else float(rng.choice([0.5, 5.0, 50.0]))


MIXED = ("sliding_attention", "full_attention")
OWN: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "llama": lambda rng: _rope(rng) | {"attention_bias": bool(rng.integers(2)), "is_causal": bool(rng.integers(3))},
    "mistral": lambda rng: {"sliding_window": None if rng.random() < 0.3 else int(rng.integers(1, 9))},
    "qwen2": lambda rng: _layers(rng, *MIXED) | {"use_sliding_window": True},
    "qwen3": lambda rng: _layers(rng, *MIXED) | {"use_sliding_window": bool(rng.integers(2))},
    "gemma": lambda rng: _rope(rng),
    "gemma2": lambda rng: _layers(rng, *MIXED) | {"attn_logit_softcapping": _cap(rng), "query_pre_attn_scalar": 16},
    "gemma3_text": lambda rng: _layers(rng, *MIXED) | {"use_bidirectional_attention": bool(rng.integers(2))},
    "phi3": lambda rng: {"sliding_window": None if rng.random() < 0.5 else int(rng.integers(1, 9)), "pad_token_id": 1},
    "phi": lambda rng: {"partial_rotary_factor": 0.5, "qk_layernorm": bool(rng.integers(2))},
    "olmo2": lambda rng: {},
    "cohere": lambda rng: {"use_qk_norm": bool(rng.integers(2))},
    "granite": lambda rng: {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "starcoder2": lambda rng: {"sliding_window": None if rng.random() < 0.5 else int(rng.integers(1, 9))},
    "stablelm": lambda rng: {"partial_rotary_factor": 0.5, "qk_layernorm": bool(rng.integers(2))},
    "smollm3": lambda rng: {"no_rope_layers": [int(rng.integers(2)) for _ in range(3)]},
    "mixtral": lambda rng: {"num_local_experts": 2, "num_experts_per_tok": 1},
    "gpt2": lambda rng: {"scale_attn_by_inverse_layer_idx": bool(rng.integers(2))},
    "gpt_neox": lambda rng: {"use_parallel_residual": bool(rng.integers(2)), "partial_rotary_factor": 0.5},
    "opt": lambda rng: {"do_layer_norm_before": bool(rng.integers(2)), "ffn_dim": 24},
    "bloom": lambda rng: {},
    "falcon": lambda rng: {"alibi": bool(rng.integers(2)), "multi_query": bool(rng.integers(2))},
    "bert": lambda rng: {"is_decoder": bool(rng.integers(2))},
    "roberta": lambda rng: {"pad_token_id": int(rng.integers(0, 5)), "is_decoder": bool(rng.integers(2))},
    "xlm-roberta": lambda rng: {"pad_token_id": int(rng.integers(0, 5))},
    "mpnet": lambda rng: {},
    "distilbert": lambda rng: {"sinusoidal_pos_embds": bool(rng.integers(2))},
    "albert": lambda rng: {"embedding_size": int(rng.choice([8, 16])), "inner_group_num": int(rng.integers(1, 3))},
    "electra": lambda rng: {"embedding_size": int(rng.choice([8, 16]))},
    "deberta-v2": lambda rng: {"relative_attention": bool(rng.integers(2)), "position_biased_input": True},
    "modernbert": lambda rng: {
        "global_attn_every_n_layers": int(rng.integers(1, 4)), "local_attention": int(rng.integers(2, 9)),
        "cls_token_id": 4, "sep_token_id": 5,
    },
}  # fmt: skip


def shape_of(kind: str, seed: int) -> dict[str, Any]:
    """Fields of a random config with at most three layers."""
    rng = np.random.default_rng(seed)
    heads, layers = int(rng.choice([1, 2, 4])), 3
    width = heads * int(rng.choice([4, 8]))
    wanted = {
        "vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": int(rng.choice([n for n in (1, 2, 4) if heads % n == 0])), "head_dim": width // heads,
        "intermediate_size": int(rng.choice([16, 40])), "moe_intermediate_size": 16,
        "max_position_embeddings": int(rng.choice([48, 512])),
        "hidden_act": str(rng.choice(["silu", "gelu", "relu"])), "tie_word_embeddings": bool(rng.integers(2)),
        "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
    default = AutoConfig.for_model(kind)
    names, known = type(default).attribute_map, default.to_dict()
    chosen = {names.get(name, name): value for name, value in wanted.items() if names.get(name, name) in known}
    dropout = {name: 0.0 for name in known if "drop" in name and isinstance(known[name], float)}
    return {"model_type": kind, **chosen, **dropout, **OWN[kind](rng)}


def check(mutation: Any) -> None:
    kind, seed, role = mutation
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    shape = shape_of(kind, seed)
    torch.manual_seed(seed)
    try:
        backbone = build_backbone(None, dict(shape), word_embeddings=role == "item")
    except ValueError as error:
        assert any(word in str(error).lower() for word in map(str.lower, REMEDIES)), f"no remedy: {error}"
        return
    enlarge(backbone)
    config = AutoConfig.for_model(**shape)
    plain = AutoModel.from_config(directed(config, True if role == "user" else None)).eval()
    missing = plain.load_state_dict(backbone.state_dict(), strict=False).missing_keys
    assert all(any(part in key for part in ("pooler", "embed", "wte")) for key in missing), missing
    rng = np.random.default_rng(seed + 1)
    with torch.no_grad():
        (check_texts if role == "item" else check_histories)(backbone, plain, rng)


def check_texts(backbone: Any, plain: Any, rng: Draw) -> None:
    texts = [torch.from_numpy(rng.integers(8, VOCABULARY, n)) for n in rng.integers(1, 31, rng.integers(1, 7))]
    offsets = torch.tensor([0, *map(len, texts)]).cumsum(0)
    for pooling in ("mean", "cls", "last", "item"):
        model = ItemLLM(backbone, pooling).eval()  # type: ignore[arg-type]
        found = model(torch.cat(texts), offsets)
        assert_close(found, torch.stack([alone(plain, text, model.item_token, pooling) for text in texts]), pooling)


def alone(plain: Any, text: Tensor, item: Tensor, pooling: str) -> Tensor:
    """E of one text, by plain transformers."""
    if pooling == "item":
        with_item = torch.cat([plain.get_input_embeddings()(text), item[None]])
        return plain(inputs_embeds=with_item[None]).last_hidden_state[0, -1]
    states = plain(input_ids=text[None]).last_hidden_state[0]
    return {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]


def check_histories(backbone: Any, plain: Any, rng: Draw) -> None:
    model = UserLLM(backbone).eval()
    lengths = rng.integers(0, 25, rng.integers(1, 5))
    counts = rng.integers(0, 4, lengths.size)
    visible = np.concatenate([rng.integers(0, n + 1, k) for n, k in zip(lengths, counts)]).astype(np.int64)
    offsets, asked = (torch.tensor([0, *n]).cumsum(0) for n in (lengths.tolist(), counts.tolist()))
    x_TD, x_QD = (torch.randn(int(n[-1]), model.width) for n in (offsets, asked))
    times = torch.zeros(len(x_TD), dtype=torch.int64)
    queries = Queries(x_QD, asked, torch.from_numpy(visible), torch.zeros(len(x_QD), dtype=torch.int64))
    try:
        h_TD, q_QD = model(x_TD, offsets, times, queries)
    except ValueError as error:  # a history longer than a window that only a mask would apply
        assert "window" in str(error), error
        return
    for user in range(lengths.size):
        history = x_TD[offsets[user] : offsets[user + 1]]
        if len(history):
            states = plain(inputs_embeds=history[None]).last_hidden_state[0]
            assert_close(h_TD[offsets[user] : offsets[user + 1]], states, "history")
        for query in range(int(asked[user]), int(asked[user + 1])):
            seen = torch.cat([history[: visible[query]], x_QD[query][None]])
            assert_close(q_QD[query], plain(inputs_embeds=seen[None]).last_hidden_state[0, -1], "query")


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    far = (found - expected).abs().max().item() / max(expected.abs().max().item(), 1e-30)
    assert far < FAR, f"{what} differs by {far:.2g} of the largest value"


TARGET = Target(
    "models",
    st.tuples(st.sampled_from(list(OWN)), st.integers(0, 2**31), st.sampled_from(["item", "item", "user"])),
    check,
)


@pytest.mark.slow
@FEWER
@example(("gemma2", 0, "item"))
@example(("modernbert", 46686, "user"))
@given(TARGET.inputs)
def test_states_are_those_of_plain_transformers_or_the_model_is_refused(mutation: Any) -> None:
    check(mutation)
