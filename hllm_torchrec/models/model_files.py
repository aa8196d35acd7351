"""Reads Hugging Face directories: config and weights. A damaged or unsuitable file raises an error that names it."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.common.foreign_files import reading_foreign, refuse_pointers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ITEM_TOKEN_FILE = "item_token.safetensors"
"""File next to a backbone's weights with the [ITEM] vector that was trained with them, `item_token` [D]."""
ADAPTER = "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_FETCH = "fetch the directory again"
_BUFFERS = re.compile(r"(inv_freq|position_ids|token_type_ids|masked_bias|att\w*\.bias)$")
"""Names of constants that earlier releases of transformers saved with the weights."""
_logger = logging.getLogger(__name__)
_LARGEST = {
    "num_hidden_layers": 1_000,
    "num_attention_heads": 4_096,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**28,
}
"""Field of a config -> maximum value; without it, a wrong digit would make the program build layers for hours."""


def read_config(directory: str) -> "PreTrainedConfig":
    """Read `config.json`; no code of the directory is executed.

    Raises:
        ValueError: the file is missing, damaged, or not the config of a model with one stack of layers; the model needs
            code of its own; or the directory has an adapter.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(directory) / "config.json"
    refuse_adapter(Path(directory))
    refuse_pointers([path])
    with reading_foreign(path, _FETCH):
        # Read the file here first, because transformers would search for a missing file on the network.
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("not a JSON object")
        if "auto_map" in facts and facts.get("model_type") not in CONFIG_MAPPING:
            raise ValueError(
                f"{path}: model_type {str(facts.get('model_type'))[:40]!r} needs code of its own (auto_map), and no "
                "custom code is run (trust_remote_code=False); choose a model that transformers knows"
            )
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        check_config(config)
    return config


def refuse_adapter(directory: Path) -> None:
    """Raise ValueError for a directory with a LoRA adapter: transformers applies it only where peft is installed."""
    if (directory / ADAPTER).is_file():
        raise ValueError(
            f"{directory}: has a LoRA adapter ({ADAPTER}), which is not read: merge it where you trust it, with peft: "
            "PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), ADAPTER).merge_and_unload()"
            ".save_pretrained(NEW), and the tokenizer likewise"
        )


def check_config(config: "PreTrainedConfig") -> None:
    """Raise ValueError for sizes that no model has, and for models with several parts."""
    parts = sorted(getattr(config, "sub_configs", None) or {})
    if parts:
        raise ValueError(
            f"{config.model_type} has several parts ({', '.join(parts)}); save its text model alone, e.g. "
            "AutoModel.from_pretrained(DIRECTORY).language_model.save_pretrained(NEW)"
        )
    for name, largest in _LARGEST.items():
        value = getattr(config, name, 1)
        if value is not None and not (isinstance(value, int) and 1 <= value <= largest):
            raise ValueError(f"{name} is {str(value)[:40]}, it must be a number from 1 to {largest}")


@contextmanager
def naming_directory(pretrained: str | None) -> Iterator[None]:
    """Context manager that adds the model's directory, if any, to the message of a ValueError.

    An ArgumentError is not changed, because its message begins with the argument's name.
    """
    try:
        yield
    except ArgumentError:
        raise
    except ValueError as error:
        if pretrained is None or str(error).startswith(pretrained):
            raise
        raise ValueError(f"{pretrained}: {error}") from error


def load_weights(directory: str, config: "PreTrainedConfig") -> "PreTrainedModel":
    """Load the weights as fp32 master weights, without remote code.

    Raises:
        ValueError: a file is damaged, or a weight is missing, is not finite, or does not have the config's shape.
    """
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    _check_weight_files(Path(directory))
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # transformers would warn about each layer that is left out on purpose
    try:
        remedy = f"its config.json and weights do not fit together: {_FETCH}"
        if getattr(config, "quantization_config", None):
            remedy = "it is quantized (quantization_config): use the model from which it was made"
        with reading_foreign(directory, remedy):
            model, report = AutoModel.from_pretrained(
                directory,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation=config._attn_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `_check_report` raises an error of one line instead
            )
    finally:
        transformers_logging.set_verbosity(verbosity)
    _check_report(directory, report)
    _warn_of_odd_weights(directory, model, report)
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():  # a finite weight's sum may overflow
            raise ValueError(f"{directory}: the weight {name} has values that are not finite; {_FETCH}")
    model.train()  # from_pretrained returns it in evaluation mode, without dropout and activation checkpointing
    return model


def _check_report(directory: str, report: dict) -> None:
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"{directory}: config.json wants {tuple(wanted)} for the weight {name}, and the file has {tuple(found)}: "
            f"they are of two models; {_FETCH}"
        )
    # The pooler is removed afterwards (`build_backbone`), so it may be missing.
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        wrapped = next((key for key in sorted(report["unexpected_keys"]) if key.endswith(f".{missing[0]}")), None)
        cause = f"not a complete checkpoint; {_FETCH}"
        if wrapped is not None:  # DataParallel, torch.compile and training frameworks add a prefix
            prefix = wrapped.removesuffix(missing[0])
            cause = f"the file's names begin with {prefix!r}, as of a wrapped model; write the file without this prefix"
        raise ValueError(f"{directory}: {len(missing)} weights are missing, e.g. {missing[0]}: {cause}")


def _warn_of_odd_weights(directory: str, model: "PreTrainedModel", report: dict) -> None:
    """Warn of weights inside the model's modules that its config does not provide for, such as biases.

    Heads, poolers and layers beyond the config's number are left out on purpose.
    """
    modules = {name for name, _ in model.named_modules() if name}
    inside = (key for key in report["unexpected_keys"] if not _BUFFERS.search(key))
    odd = sorted(key for key in inside if {key.rpartition(".")[0], key.rpartition(".")[0].rpartition(".")[0]} & modules)
    if odd:
        _logger.warning(
            "%s: %d weights are not used, e.g. %s: config.json describes a model without them, so the embeddings "
            "differ from those of the trained model: compare config.json with the original",
            directory,
            len(odd),
            odd[0],
        )


def vocabulary_head(pretrained: str | None, backbone: "PreTrainedModel") -> nn.Linear | None:
    """The vocabulary head [V, C] in a model's directory; None if it is tied to the word embeddings.

    If the directory has no `lm_head.weight`, the head is assumed to be tied. Without a directory (a model with random
    weights) the head is initialized randomly, or None if the config ties it.

    Raises:
        ValueError: the file is damaged, or the head and the word embeddings have different shapes.
    """
    words = backbone.get_input_embeddings().weight
    if pretrained is None:
        untied = not getattr(backbone.config, "tie_word_embeddings", True)
        return nn.Linear(words.shape[1], words.shape[0], bias=False) if untied else None
    for path in _weight_files(Path(pretrained)):
        with reading_foreign(path, _FETCH), safe_open(str(path), "pt") as file:
            if "lm_head.weight" in file.keys():
                weight = file.get_tensor("lm_head.weight").float()
                if weight.shape != words.shape:
                    raise ValueError(
                        f"lm_head.weight has shape {tuple(weight.shape)}, but the word embeddings have shape "
                        f"{tuple(words.shape)}"
                    )
                head = nn.Linear(words.shape[1], words.shape[0], bias=False)
                head.weight.data.copy_(weight)
                return head
    return None


def trained_item_token(pretrained: str | None, width: int) -> Tensor | None:
    """The [ITEM] vector [width] of an exported or imported Item LLM; None if the directory has none.

    Raises:
        ValueError: the file is damaged, or its vector does not have this width.
    """
    if pretrained is None or not (path := Path(pretrained) / ITEM_TOKEN_FILE).is_file():
        return None
    refuse_pointers([path])
    with reading_foreign(path, "export or import the model again"), safe_open(str(path), "pt") as file:
        token: Tensor = file.get_tensor("item_token").float()
        if token.shape != (width,):
            raise ValueError(f"item_token has shape {tuple(token.shape)}, the model is {width} wide")
    return token


def _check_weight_files(directory: Path) -> None:
    """Raise ValueError if a safetensors file is missing, or is incomplete according to its header."""
    for path in _weight_files(directory):
        refuse_pointers([path])
        with reading_foreign(path, "the download was cut or the file is another kind: fetch it again"):
            if not path.is_file():
                raise ValueError("no such file, though the index names it")
            with safe_open(str(path), "pt"):
                pass


def _weight_files(directory: Path) -> Iterator[Path]:
    index = directory / INDEX
    if (directory / WEIGHTS).is_file():
        yield directory / WEIGHTS
    elif index.is_file():
        refuse_pointers([index])
        with reading_foreign(index, _FETCH):
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            wrong = [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", str(name))]
            if wrong:
                raise ValueError(f"names {wrong[0]!r}, it must be a safetensors file in the same directory")
        yield from (directory / name for name in sorted(names))
    else:
        others = sorted(p.name for p in directory.glob("*") if re.search(r"\.(bin|gguf|pt|pth|h5|msgpack)$", p.name))
        found = f"only {', '.join(others[:3])}" if others else "none"
        raise ValueError(
            f"{directory}: no {WEIGHTS} ({found}): weights are read from safetensors files, as others can hold code; "
            "convert them once where you trust them: AutoModel.from_pretrained(DIRECTORY"
            f"{', gguf_file=NAME' if any(name.endswith('gguf') for name in others) else ''}).save_pretrained(NEW), and "
            "the tokenizer likewise"
        )
