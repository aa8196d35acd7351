"""Saving of backbones as Hugging Face directories, which transformers loads without this library."""

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
    """Write a bare model (`AutoModel`, no head) into the folder `target`.

    Args:
        config: of the model; not modified.
        state: its weights by their bare names (`layers.0...`); all of one dtype.
        item_token: [D] the [ITEM] vector, stored in a separate file of the folder; None: there is none.

    Raises:
        ValueError: weights are missing, unknown to the model, or of another shape.
    """
    from transformers import AutoModel

    config = copy.deepcopy(config)
    config.dtype = next(iter(state.values())).dtype
    config._attn_implementation = "eager"  # every model has it, and config.json does not name it
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=False)
    # BERT's pooler is not used by this library, so the state may lack it: the saved model then has none.
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
        config: of its bare model; not modified.
        state: the bare model's weights by their bare names; all of one dtype.
        head: [V, C] weight of the vocabulary head; None: tied to the word embeddings.

    Raises:
        ValueError: weights are missing, unknown to the model, or of another shape.
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
    """Reduce a decoder that reads only vectors to a vocabulary of one word with a zero embedding.

    transformers cannot omit word embeddings, and would initialize missing ones at random.
    """
    config, state = copy.deepcopy(config), dict(state)
    config.vocab_size = 1
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    any_weight = next(iter(state.values()))
    state[WORDS] = torch.zeros(1, config.hidden_size, dtype=any_weight.dtype)
    return config, state


def _check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor], target: Path) -> None:
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing:
        raise ValueError(f"{target.name}: {len(missing)} weights are missing, e.g. {missing[0]}: give the config of "
                         "the model that was trained")  # fmt: skip
    if unknown:
        raise ValueError(f"{target.name}: {len(unknown)} weights are not of this model, e.g. {unknown[0]}: give the "
                         "config of the model that was trained")  # fmt: skip
    if shapes:
        name = min(shapes)
        raise ValueError(
            f"{target.name}: {name} is {tuple(state[name].shape)}, the config wants {tuple(own[name].shape)}: give "
            "the config of the model that was trained"
        )
