"""Facts about the Item LLM that a store of item embeddings records: inputs of the embeddings, except the texts."""

import hashlib
from typing import Any

import torch
from torch import nn

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.distributed.wrappers import full_tensor
from hllm_torchrec.models.experiment import Experiment


def item_facts(experiment: Experiment) -> dict[str, Any]:
    """Collect inputs of item embeddings: weights, pooling, normalization, int8, tokenizer, text layout. Collective.

    Texts are not included. The direction of the attention (`item_llm.causal`) is included if it is not the model's own.

    Raises:
        ConfigError: the model has no Item LLM.
    """
    item_llm, encoder = experiment.hllm.item_llm, experiment.item_encoder
    if item_llm is None or encoder is None:
        raise ConfigError("item_llm.enabled: false: a model without an Item LLM has no item embeddings to store")
    layout = ("tokenizer", "prompt", "keys", "separator", "max_text_length")
    return {
        "part": "items",
        "weights": hash_weights(item_llm),
        "pooling": item_llm.pooling,
        **({"normalize": True} if item_llm.normalize else {}),
        **({"quantization": "int8"} if encoder.quantizes else {}),
        **({"causal": item_llm.causal} if item_llm.is_turned else {}),
        **{name: encoder.tokens.facts[name] for name in layout},
    }


def hash_weights(module: nn.Module) -> str:
    """SHA-256 of a module's weights with their names and shapes, on any device, sharded or not. Collective."""
    digest = hashlib.sha256()
    # Sorted: every rank gathers the (sharded) weights in the same order.
    for name, weight in sorted(module.named_parameters()):
        values = full_tensor(weight.detach()).cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
