"""What a checkpoint leaves out: weights of an LLM that has adapters (LoRA) and came from a Hugging Face directory.

They never change, and are where they came from. The checkpoint has a mark of them, so that others are noticed.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hllm_torchrec.config import Config
from hllm_torchrec.modules.lora import is_adapter

_PARTS = {"item_llm": "item_llm.backbone.", "user": "user.backbone."}
"""Part of the configuration -> how the names of its LLM's weights begin in the model."""

_ENDS = 64
"""Numbers at each end of a weight that a mark is made of: all of them would take a minute for 7B."""


def left_out(config: Config) -> dict[str, str]:
    """Parts whose LLM's own weights are in no checkpoint, with how their names begin."""
    item, user = config.item_llm, config.user
    parts = {"item_llm": (item.lora, item.pretrained), "user": (user.lora, user.pretrained)}
    return {name: _PARTS[name] for name, (lora, pretrained) in parts.items() if lora.rank and pretrained is not None}


def without_bases(state: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """A model's state as checkpoints hold it."""
    prefixes = tuple(left_out(config).values())
    return {key: value for key, value in state.items() if not key.startswith(prefixes) or is_adapter(key)}


@torch.no_grad()
def base_marks(model: nn.Module, config: Config) -> dict[str, str]:
    """Part -> a hash of the weights that checkpoints leave out: of names, shapes and both ends of each.

    model: not yet sharded.
    """
    return {name: _mark(model, prefix) for name, prefix in left_out(config).items()}


def _mark(model: nn.Module, prefix: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in _own(model, prefix):
        flat = weight.detach().flatten()
        ends = torch.cat([flat[:_ENDS], flat[-_ENDS:]]).float().cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + ends.numpy().tobytes())
    return digest.hexdigest()


def _own(model: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    return ((n, p) for n, p in model.named_parameters() if n.startswith(prefix) and not is_adapter(n))


def check_bases(extra: Mapping[str, Any], marks: Mapping[str, str], config: Config, checkpoint: object) -> None:
    """Compare the LLMs of this model with those that a checkpoint's adapters were trained on.

    extra: the checkpoint's.

    Raises:
        ValueError: they are others.
    """
    pretrained = {"item_llm": config.item_llm.pretrained, "user": config.user.pretrained}
    for part, mark in (extra.get("bases") or {}).items():
        if part in marks and mark != marks[part]:
            raise ValueError(
                f"{checkpoint}: its adapters belong to other weights than {part}.pretrained, {pretrained[part]}, holds "
                "now: put the directory back that the run was trained with"
            )
