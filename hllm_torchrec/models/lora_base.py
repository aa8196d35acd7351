"""What a checkpoint leaves out: weights of an LLM that has adapters (LoRA) and came from a Hugging Face directory.

They never change, and are where they came from. The checkpoint has a fingerprint of them, so that others are noticed.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hllm_torchrec.config.schema import Config
from hllm_torchrec.models.named_backbones import backbone_prefix, backbone_sections
from hllm_torchrec.modules.lora import is_adapter

_SAMPLED_VALUES = 64
"""Numbers at each end of a weight that a fingerprint is made of: all of them would take a minute for 7B."""


def base_prefixes(config: Config) -> dict[str, str]:
    """Parts whose LLM's own weights are in no checkpoint, with how their names begin."""
    return {
        name: backbone_prefix(name)
        for name, section in backbone_sections(config)
        if section.lora.rank and section.pretrained is not None
    }


def without_base_weights(state: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """A model's state as checkpoints hold it."""
    prefixes = tuple(base_prefixes(config).values())
    return {key: value for key, value in state.items() if not key.startswith(prefixes) or is_adapter(key)}


@torch.no_grad()
def base_fingerprints(model: nn.Module, config: Config) -> dict[str, str]:
    """Part -> a hash of the weights that checkpoints leave out: of names, shapes and both ends of each.

    model: not yet sharded.
    """
    return {name: _fingerprint(model, prefix) for name, prefix in base_prefixes(config).items()}


def _fingerprint(model: nn.Module, prefix: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in _base_parameters(model, prefix):
        flat = weight.detach().flatten()
        ends = torch.cat([flat[:_SAMPLED_VALUES], flat[-_SAMPLED_VALUES:]]).float().cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + ends.numpy().tobytes())
    return digest.hexdigest()


def _base_parameters(model: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    return ((n, p) for n, p in model.named_parameters() if n.startswith(prefix) and not is_adapter(n))


def check_base_weights(
    extra: Mapping[str, Any], fingerprints: Mapping[str, str], config: Config, checkpoint: object
) -> None:
    """Compare the LLMs of this model with those that a checkpoint's adapters were trained on.

    extra: the checkpoint's.

    Raises:
        ValueError: they are others.
    """
    for part, mark in (extra.get("bases") or {}).items():
        if part in fingerprints and mark != fingerprints[part]:
            raise ValueError(
                f"{checkpoint}: its adapters belong to other weights than {part}.pretrained, "
                f"{getattr(config, part).pretrained}, holds now: put the directory back that the run was trained with"
            )
