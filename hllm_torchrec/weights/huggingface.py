"""Saving of backbones as Hugging Face directories, which transformers can load without this library."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from hllm_torchrec.models.model_files import ITEM_TOKEN_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WORDS = "embed_tokens.weight"
"""Name of the word embeddings in decoders of the Llama family."""


def save_backbone(
    config: "PreTrainedConfig", state: Mapping[str, Tensor], target: Path, item_token: Tensor | None = None
) -> None:
    """Write a model without head (`AutoModel`) into the folder `target`.

    Args:
        config: configuration of the model; not modified.
        state: weights of the model by their names in `AutoModel` (`layers.0...`); all of one dtype.
        item_token: the [ITEM] vector [D], which is stored in a separate file of the folder, or None.

    Raises:
        ValueError: weights are missing, unknown to the model, or have another shape.
    """
    from transformers import AutoModel

    config = copy.deepcopy(config)
    config.dtype = next(iter(state.values())).dtype
    config._attn_implementation = "eager"  # every model has it, and config.json does not name it
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=False)
    # This library does not use BERT's pooler, so `state` may lack it: the model is then saved without a pooler.
    if getattr(model, "pooler", None) is not None and not any(name.startswith("pooler.") for name in state):
        model.pooler = None
    _check_state(model.state_dict(), state, target)
    model.load_state_dict(dict(state), assign=True)
    model.save_pretrained(str(target))
    if item_token is not None:
        save_file({"item_token": item_token.detach().contiguous()}, str(target / ITEM_TOKEN_FILE))


def save_causal_model(
    config: "PreTrainedConfig", state: Mapping[str, Tensor], head: Tensor | None, target: Path
) -> None:
    """Write a causal language model (`AutoModelForCausalLM`) into the folder `target`.

    Args:
        config: configuration of its model without head; not modified.
        state: weights of the model without head by their names in `AutoModel`; all of one dtype.
        head: [V, C] weight of the vocabulary head; None: tied to the word embeddings.

    Raises:
        ValueError: weights are missing, unknown to the model, or have another shape.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.dtype, config.tie_word_embeddings = next(iter(state.values())).dtype, head is None
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    named = {f"{model.base_model_prefix}.{name}": weight for name, weight in state.items()}
    named["lm_head.weight"] = named[f"{model.base_model_prefix}.{WORDS}"] if head is None else head
    _check_state(model.state_dict(), named, target)
    model.load_state_dict(named, assign=True)
    if head is None:
        model.tie_weights()
    model.save_pretrained(str(target))


def without_word_embeddings(
    config: "PreTrainedConfig", state: Mapping[str, Tensor]
) -> tuple["PreTrainedConfig", dict[str, Tensor]]:
    """Return config and weights of a decoder that reads only vectors, with a vocabulary of one word of embedding 0.

    transformers requires word embeddings, and would initialize missing ones at random.
    """
    config, state = copy.deepcopy(config), dict(state)
    config.vocab_size = 1
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    any_weight = next(iter(state.values()))
    state[WORDS] = torch.zeros(1, config.hidden_size, dtype=any_weight.dtype)
    return config, state


def _check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], target: Path) -> None:
    """Raise ValueError if the names or shapes of `state` differ from those of the model's `expected` weights."""
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = [name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape]
    if missing:
        raise ValueError(f"{target.name}: {len(missing)} weights are missing, e.g. {missing[0]}: give the config of "
                         "the model that was trained")  # fmt: skip
    if unknown:
        raise ValueError(f"{target.name}: {len(unknown)} weights are not of this model, e.g. {unknown[0]}: give the "
                         "config of the model that was trained")  # fmt: skip
    if shapes:
        name = min(shapes)
        raise ValueError(
            f"{target.name}: {name} is {tuple(state[name].shape)}, the config wants {tuple(expected[name].shape)}: "
            "give the config of the model that was trained"
        )
