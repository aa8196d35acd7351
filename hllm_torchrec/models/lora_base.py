"""LoRA base weights: excluded from checkpoints, identified by a fingerprint.

The base weights belong to an LLM that has adapters (LoRA) and was loaded from a Hugging Face directory. They are frozen
and remain in that directory. Each checkpoint stores a fingerprint of them, so that a changed directory is detected.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hllm_torchrec.config.schema import Config
from hllm_torchrec.models.named_backbones import backbone_prefix, backbone_sections
from hllm_torchrec.modules.lora import is_adapter

_SAMPLED_VALUES = 64
"""Number of values hashed from each end of a weight; hashing all values would take a minute for 7B parameters."""


def base_prefixes(config: Config) -> dict[str, str]:
    """Section -> prefix of its parameter names, for LLMs whose base weights are excluded from checkpoints."""
    return {
        name: backbone_prefix(name)
        for name, section in backbone_sections(config)
        if section.lora.rank and section.pretrained is not None
    }


def without_base_weights(state: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The state dict without the excluded base weights; adapters are kept."""
    prefixes = tuple(base_prefixes(config).values())
    return {key: value for key, value in state.items() if not key.startswith(prefixes) or is_adapter(key)}


@torch.no_grad()
def base_fingerprints(model: nn.Module, config: Config) -> dict[str, str]:
    """Section -> hash of the excluded base weights: names, shapes, and the values at both ends of each weight.

    model: must not be sharded yet.
    """
    return {name: _fingerprint(model, prefix) for name, prefix in base_prefixes(config).items()}


def _fingerprint(model: nn.Module, prefix: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in model.named_parameters():
        if not name.startswith(prefix) or is_adapter(name):
            continue
        flat = weight.detach().flatten()
        ends = torch.cat([flat[:_SAMPLED_VALUES], flat[-_SAMPLED_VALUES:]]).float().cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + ends.numpy().tobytes())
    return digest.hexdigest()


def check_base_weights(
    extra: Mapping[str, Any], fingerprints: Mapping[str, str], config: Config, checkpoint: object
) -> None:
    """Compare the base weights of this model with the base weights that a checkpoint's adapters were trained on.

    extra: content of the checkpoint's `extra.json`.

    Raises:
        ValueError: the fingerprints differ.
    """
    for section, fingerprint in (extra.get("bases") or {}).items():
        if section in fingerprints and fingerprint != fingerprints[section]:
            raise ValueError(
                f"{checkpoint}: its adapters were trained on other weights than those now in {section}.pretrained, "
                f"{getattr(config, section).pretrained}: restore the directory that the run was trained with"
            )
