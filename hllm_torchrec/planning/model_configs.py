"""Shapes of published LLMs, for planning without their weights."""

import dataclasses
from pathlib import Path
from typing import Any

from hllm_torchrec.config.schema import Config
from hllm_torchrec.models.model_files import read_config
from hllm_torchrec.models.named_backbones import backbone_sections

MODEL_CONFIGS: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "baichuan2-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 125696,
    },
    "bert-base-uncased": {
        "model_type": "bert",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 30522,
    },
    "bert-large-uncased": {
        "model_type": "bert",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "vocab_size": 30522,
    },
}
"""Beginning of a directory's name -> Hugging Face config, used if the `pretrained` directory has no config.json."""


def with_model_configs(config: Config) -> Config:
    """Return the configuration with shapes instead of pretrained weights, whose values planning does not need.

    Raises:
        ValueError: a directory has no config.json, and its name does not begin with a name in MODEL_CONFIGS.
    """
    known: dict[str, Any] = {
        name: dataclasses.replace(section, pretrained=None, shape=_shape_of(name, section.pretrained))
        for name, section in backbone_sections(config)
        if section.pretrained is not None
    }
    return dataclasses.replace(config, **known)


def _shape_of(part: str, directory: str) -> dict[str, Any]:
    if (Path(directory) / "config.json").is_file():
        shape: dict[str, Any] = read_config(directory).to_dict()
        return shape
    name = Path(directory).name.lower()
    for known, shape in MODEL_CONFIGS.items():
        if name.startswith(known):
            return shape
    raise ValueError(
        f"{part}.pretrained: {directory}: has no config.json, and {name!r} does not begin with the name of a known "
        f"shape ({', '.join(MODEL_CONFIGS)}); download the model, or give {part}.shape"
    )
