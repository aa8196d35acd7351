"""Import of HLLM's published weights (`pytorch_model.bin` of ByteDance's code) as models of this library.

    item_llm.*, user_llm.*    LlamaForCausalLM's names, or Baichuan2's     -> item_llm/, user_llm/ (safetensors)
    item_emb_tokens [1, 1, D] the [ITEM] vector                            -> item_llm/item_token.safetensors
    logit_scale []            log of the inverse temperature               -> objective.temperature of config.yaml

The vocabulary heads and the User LLM's word embeddings are omitted, because item and user embeddings do not depend on
them. The published code numbers an item's positions backwards from `max_text_length`, and those of a history including
the padding on its left; this library counts both from 0. With rotary positions, which depend only on distances, the
results are equal. Models with other positions are refused.
"""

import json
import math
import pickle
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from hllm_torchrec.common.atomic_files import atomic_folder
from hllm_torchrec.data.token_store import TOKENIZER_FILES
from hllm_torchrec.modules.losses.objectives import MAX_SCALE
from hllm_torchrec.weights.huggingface import WORDS, save_backbone, without_word_embeddings

PROMPT = "Compress the following sentence into embedding: "
"""Prefix of every item's text in the published code."""

NCE_THRESHOLD = 0.99
"""The published code masks negatives whose cosine with the positive is above this value (`nce_thres`)."""


@dataclass(frozen=True)
class PublicHLLM:
    """Contents of a checkpoint. item_llm, user_llm: weights by their names in `AutoModel`; item_token: [D];
    temperature: > 0."""

    item_llm: dict[str, Tensor]
    user_llm: dict[str, Tensor]
    item_token: Tensor
    temperature: float


@dataclass(frozen=True)
class TextOptions:
    """Text and history options of the training run, which the checkpoint does not contain.

    prompt, text_keys: an item's text is the prompt followed by `key: value` for each key, without a separator;
    max_text_length: in tokens; max_history: in events.
    """

    prompt: str = PROMPT
    text_keys: tuple[str, ...] = ("title", "tag", "description")
    max_text_length: int = 256
    max_history: int = 50


def read_public(checkpoint: Path) -> PublicHLLM:
    """Read a `pytorch_model.bin` with `weights_only=True`, which executes no code from it.

    Raises:
        ValueError: the file does not exist, contains anything except tensors, or lacks a part of HLLM.
    """
    state = _load(checkpoint)
    missing = [name for name in ("item_emb_tokens", "logit_scale") if name not in state]
    parts = {part: dict(_bare(state, f"{part}.")) for part in ("item_llm", "user_llm")}
    missing += [f"{part}.*" for part, found in parts.items() if not found]
    if missing:
        raise ValueError(
            f"{checkpoint}: has no {', '.join(missing)}, which checkpoints of the published HLLM code have; found e.g. "
            f"{', '.join(sorted(state)[:3])}"
        )
    # The published training code clamps the scale to the same maximum, so larger values had no effect.
    scale = min(float(state["logit_scale"].float().exp()), MAX_SCALE)
    return PublicHLLM(parts["item_llm"], parts["user_llm"], state["item_emb_tokens"].reshape(-1), 1 / scale)


def import_public(
    checkpoint: Path, item_llm: Path, user_llm: Path, output: Path, text: TextOptions, dataset: str = "data/hllm"
) -> None:
    """Convert a checkpoint to the folder `output`: `item_llm/`, `user_llm/`, and a `config.yaml` to train from them.

    Args:
        checkpoint: path of `pytorch_model.bin`.
        item_llm, user_llm: Hugging Face directories of the models from which training started. Only their configs and
            the Item LLM's tokenizer are read.
        output: a new folder, created atomically.
        dataset: path of the dataset in the written configuration.

    Raises:
        ValueError: as `read_public`; or a config does not fit the weights, the positions are not rotary, the Item LLM
            has no tokenizer, or `output` exists.
    """
    if output.exists():
        raise ValueError(f"{output}: already exists; name another folder, or remove it")
    public = read_public(checkpoint)
    files = [item_llm / name for name in TOKENIZER_FILES if (item_llm / name).is_file()]
    if not files:
        raise ValueError(
            f"{item_llm}: has no tokenizer (such as tokenizer.json); give a directory with the Item LLM's tokenizer"
        )
    configs = {"item_llm": rotary_config(item_llm), "user_llm": rotary_config(user_llm)}
    with atomic_folder(output) as folder:
        save_backbone(configs["item_llm"], public.item_llm, folder / "item_llm", public.item_token)
        user = {name: weight for name, weight in public.user_llm.items() if name != WORDS}
        save_backbone(*without_word_embeddings(configs["user_llm"], user), folder / "user_llm")
        for file in files:
            shutil.copy(file, folder / "item_llm" / file.name)
        settings = _settings(output, public.temperature, text, dataset)
        (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def rotary_config(directory: Path) -> PreTrainedConfig:
    """Read the config of a decoder with rotary positions; that of Baichuan2-7B is converted to an equivalent Llama's.

    Raises:
        ValueError: the directory has no config.json, or the positions are not rotary.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory}: not a Hugging Face directory (no config.json)")
    facts = json.loads(path.read_text(encoding="utf-8"))
    if facts.get("model_type") == "baichuan":
        return _baichuan(facts, directory)
    config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    if getattr(config, "rope_parameters", None) is None:
        raise ValueError(
            f"{directory}: {config.model_type} has no rotary positions, and the published code counts positions from "
            "the padding: its embeddings cannot be reproduced"
        )
    return config


def _baichuan(facts: dict[str, Any], directory: Path) -> LlamaConfig:
    """Convert the config of Baichuan2-7B, which is a Llama with q, k and v in one matrix.

    Raises:
        ValueError: the config is that of Baichuan2-13B, which has ALiBi positions.
    """
    if "max_position_embeddings" not in facts:
        raise ValueError(f"{directory}: Baichuan2-13B has ALiBi positions, no rotary ones: only 7B can be converted")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    more = ("max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id")
    return LlamaConfig(**{name: facts[name] for name in (*names, *more) if name in facts})


def _load(checkpoint: Path) -> Mapping[str, Tensor]:
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint}: no such file; give the published pytorch_model.bin")
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{checkpoint}: cannot be read as weights alone: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{checkpoint}: is not a mapping of names to tensors")
    return state


def _bare(state: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in `AutoModel`, weight) of the LLM with this prefix.

    The vocabulary head and cached rotary frequencies are left out; Baichuan2's W_pack is split into q, k and v.
    """
    for name, weight in state.items():
        if not name.startswith(prefix) or name.endswith("rotary_emb.inv_freq"):
            continue
        name = name.removeprefix(prefix)
        if name.startswith("lm_head."):
            continue
        name = name.removeprefix("model.")
        # Baichuan2 stores q, k and v as one matrix, in this order.
        if name.endswith("self_attn.W_pack.weight"):
            for kind, part in zip("qkv", weight.chunk(3), strict=True):
                yield name.replace("W_pack", f"{kind}_proj"), part
        else:
            yield name, weight


def _settings(output: Path, temperature: float, text: TextOptions, dataset: str) -> dict[str, Any]:
    """Return a configuration like the published one: generative loss only, without IDs, actions and time features."""
    assert math.isfinite(temperature) and temperature > 0
    return {
        "output": str(output),
        "data": {"dataset": dataset, "history": "all", "max_history": text.max_history + 1, "batch_users": 16},
        "item_llm": {
            "pretrained": str(output / "item_llm"),
            "prompt": text.prompt,
            "text_keys": list(text.text_keys),
            "separator": "",
            "max_text_length": text.max_text_length,
        },
        "user": {"pretrained": str(output / "user_llm")},
        "features": {"item_id": False, "action": False, "time_depth": 0},
        "objective": {
            "fusion": "none",
            "negatives": 512,
            "positive_targets_only": False,
            # The published loss masks negatives only by their cosine with the positive.
            "mask_own_items": False,
            "mask_cosine_above": NCE_THRESHOLD,
            "temperature": temperature,
        },
        "stages": [{"name": "end to end", "epochs": 5}],
        "optim": {"lr": 1e-4, "item_llm_lr": 1e-4, "weight_decay": 0.01},
    }
