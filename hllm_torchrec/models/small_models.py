"""Small random models of a Hugging Face config, and detection of the direction of their attention.

A small model has one layer of each kind in the config (at most four, and at least two unless the config has one),
few heads of the original width, few words and short windows, so that building it and encoding a few texts takes a
fraction of a second.
"""

import copy
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.common.foreign_files import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TOLERANCE = 1e-3
"""Maximum difference from plain transformers, relative to the largest value; float32 rounding is about 1e-6."""
ROUNDING = 1e-5
"""Maximum relative difference that a different order of float32 operations causes."""
LENGTHS = (12, 1, 5, 11, 3)
"""Number of tokens of the compared texts: some are longer than the windows, two pairs share a padded batch."""
NO_WINDOW = 512
"""Size of a window that is longer than all compared texts."""
_WINDOW, _VOCABULARY, _FIRST_WORD = 6, 96, 8
_PLACES, _LEAST_PLACES = "max_position_embeddings", 64
_NARROW = {"intermediate_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
_OF_HEADS = ("num_attention_heads", "num_key_value_heads", "hidden_size")
_WINDOWS = ("sliding_window", "local_attention", "attention_chunk_size")


def directed(config: "PreTrainedConfig", causal: bool | None) -> "PreTrainedConfig":
    """A copy of the config with its fields for the direction set to `causal`; None: unchanged."""
    config = copy.deepcopy(config)
    if causal is None or is_causal(config) == causal:
        return config
    config.is_causal = causal
    for name, value in (("is_decoder", causal), ("use_bidirectional_attention", not causal)):
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def is_causal(config: "PreTrainedConfig") -> bool:
    """True if the model of the config has causal attention in transformers. Raises like `text_reading`."""
    return _is_causal(config_key(config))


@functools.lru_cache(maxsize=64)
def _is_causal(key: str) -> bool:
    with apart():
        return reads_causally(plain_model(small_config(key)))


def config_key(config: "PreTrainedConfig") -> str:
    """All fields of a config that its model depends on, as JSON text."""
    # to_dict has the fields of config.json; the removed names and versions do not affect the model.
    facts = config.to_dict()
    for name in ("_name_or_path", "transformers_version", "architectures", "dtype", "auto_map"):
        facts.pop(name, None)
    return json.dumps(facts, sort_keys=True, default=str)


def changed_direction(config: "PreTrainedConfig", causal: bool) -> "PreTrainedConfig":
    """The small config with the given direction. Raises ArgumentError if transformers cannot change the direction."""
    changed = directed(config, causal)
    if reads_causally(plain_model(changed)) != causal:
        raise ArgumentError(
            f"causal: {causal}: {config.model_type} reads with causal: {not causal}, and transformers cannot change "
            "it; leave the option out"
        )
    return changed


@contextmanager
def apart() -> Iterator[None]:
    """Context manager: run on the CPU with seed 0 and without logs, and restore the caller's random state."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def small_config(key: str, window: int = _WINDOW) -> "PreTrainedConfig":
    """The config of `config_key` with one layer of each kind (`_kinds_of_layers`), few heads, windows of `window`."""
    from transformers import AutoConfig

    facts = json.loads(key)
    names = type(AutoConfig.for_model(**facts)).attribute_map  # e.g. hidden_size -> n_embd
    layers = facts[names.get("num_hidden_layers", "num_hidden_layers")]
    kept = _kinds_of_layers(facts, layers)
    facts |= {name: [value[i] for i in kept] for name, value in _per_layer(facts, layers)}
    wanted: dict[str, Any] = {"num_hidden_layers": len(kept), "vocab_size": _VOCABULARY, **_NARROW}
    wanted |= dict.fromkeys(_WINDOWS, window)
    wanted["max_position_embeddings"] = max(facts.get(names.get(_PLACES, _PLACES)) or 0, _LEAST_PLACES)
    wanted |= _fewer_heads({name: facts.get(names.get(name, name)) for name in _OF_HEADS})
    if "hidden_size" in wanted and facts.get("word_embed_proj_dim") == facts.get("hidden_size"):  # OPT's
        wanted["word_embed_proj_dim"] = wanted["hidden_size"]
    facts |= {names.get(name, name): value for name, value in wanted.items() if facts.get(names.get(name, name))}
    for name, value in facts.items():
        if name.endswith("_token_id") and isinstance(value, int) and value >= _FIRST_WORD:
            facts[name] = 1
    return AutoConfig.for_model(**facts)


def _per_layer(facts: dict[str, Any], layers: int) -> Iterator[tuple[str, list[Any]]]:
    """Yield (name, list) of the fields that are lists with one entry per layer."""
    for name, value in facts.items():
        if isinstance(value, list) and len(value) == layers and layers > 1:
            yield name, value


def _kinds_of_layers(facts: dict[str, Any], layers: int) -> list[int]:
    """Indices of the first layer of each kind (at most four); at least two layers unless the model has one."""
    first: dict[str, int] = {}
    columns = [value for _, value in _per_layer(facts, layers)]
    for layer in range(layers):
        first.setdefault(json.dumps([column[layer] for column in columns], default=str), layer)
    kept = sorted(first.values())[:4]
    return kept if len(kept) > 1 or layers == 1 else [kept[0], layers - 1]


def _fewer_heads(facts: dict[str, Any]) -> dict[str, int]:
    """Fields for at most four heads of the same width, with grouped key/value heads if the model has them."""
    heads, width = facts["num_attention_heads"], facts["hidden_size"]
    shared = facts["num_key_value_heads"] or heads
    if not all(isinstance(number, int) for number in (heads, width, shared)) or heads <= 4:
        return {}
    if width % heads or heads % shared:
        return {}
    few = min(shared, 2)
    number = few * min(heads // shared, 2)
    return {"num_attention_heads": number, "num_key_value_heads": few, "hidden_size": number * (width // heads)}


def plain_model(config: "PreTrainedConfig") -> "PreTrainedModel":
    """The unpatched model in evaluation mode, with random values added to the initial weights.

    Raises:
        ValueError: transformers cannot build the model.
    """
    from transformers import AutoModel

    try:
        model: PreTrainedModel = AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    except Exception as error:
        raise ValueError(
            f"{config.model_type}: transformers cannot build a small model of its config.json ({first_line(error)}); "
            "correct it, or fetch the directory again"
        ) from error
    return model.eval()


def sample_texts() -> list[Tensor]:
    """Random token ids of texts with `LENGTHS` tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(_FIRST_WORD, _VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def reads_causally(plain: "PreTrainedModel") -> bool:
    """True if a text's last token does not change the states of the tokens before it."""
    text = sample_texts()[0]
    other = text.clone()
    other[-1] = _FIRST_WORD if text[-1] != _FIRST_WORD else _FIRST_WORD + 1
    with torch.no_grad():
        first, second = (last_states(plain, input_ids=t[None])[:-1] for t in (text, other))
    return relative_difference(first, second) < ROUNDING


def sensitivity(plain: "PreTrainedModel") -> float:
    """Relative change of the state of a text's last token when the tokens before it change.

    A leak from another text can change an embedding by about as much, so a small value requires a small tolerance.
    """
    text = sample_texts()[0]
    other = torch.cat([text[:-1].flip(0), text[-1:]])
    with torch.no_grad():
        return relative_difference(*(last_states(plain, input_ids=t[None])[-1] for t in (text, other)))


def last_states(model: "PreTrainedModel", **inputs: Tensor) -> Tensor:
    """Last hidden states [N, D] of one text. Raises ValueError if the model does not run on text alone."""
    try:
        states: Tensor = model(**inputs).last_hidden_state[0]
    except Exception as error:
        raise ValueError(
            f"{model.config.model_type}: transformers does not run it on text alone ({first_line(error)}): choose a "
            "decoder or an encoder of text, see docs/support.md"
        ) from error
    return states


def item_token(model: "PreTrainedModel") -> Tensor:
    """A vector to use as [ITEM]."""
    words = model.get_input_embeddings().weight
    return words.detach()[_FIRST_WORD : _FIRST_WORD + 3].mean(0)


def relative_difference(one: Tensor, two: Tensor) -> float:
    """Maximum difference relative to the largest value of `one`; infinite if the result is NaN."""
    scale = max(one.abs().max().item(), 1e-30)
    far = (one - two).abs().max().item() / scale
    return far if far == far else float("inf")
