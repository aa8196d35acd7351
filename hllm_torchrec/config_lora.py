"""The part of a configuration that says how an LLM is adapted without training its weights: see docs/weights.md."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hllm_torchrec.config import Config


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on an LLM whose own weights stay as they are: W x + alpha / rank * B A x."""

    rank: int = 0
    """Of the adapters; 0: none, the LLM itself trains."""
    alpha: float = 16.0
    """Adapters add alpha / rank times their product. They begin as nothing."""
    dropout: float = 0.0
    """Of an adapter's input, a probability."""
    targets: tuple[str, ...] = ()
    """Last names of the linear layers that get one, such as [q_proj, v_proj]; none given: all of the LLM's layers."""


LORA_BOUNDS = {
    f"{part}.lora.{name}": bound
    for part in ("item_llm", "user")
    for name, bound in {"rank": ">= 0", "alpha": "> 0", "dropout": ">= 0, < 1"}.items()
}
"""Ranges of its numbers, as `config_rules.BOUNDS` has them."""


def lora_problems(config: "Config") -> Iterator[str]:
    """Adapters where there is no Hugging Face model, or that nothing would ever train."""
    item, user = config.item_llm, config.user
    if item.lora.rank and not item.enabled:
        yield (
            f"item_llm.lora.rank: {item.lora.rank} while item_llm.enabled is false: there is no LLM to adapt; write 0"
        )
    if user.lora.rank and user.encoder != "llm":
        yield (
            f"user.lora.rank: {user.lora.rank}: user.encoder {user.encoder!r} is no Hugging Face decoder; write 0, or "
            "user.encoder llm"
        )
    for name, part in (("item_llm", item), ("user", user)):
        # A later stage may freeze adapters that another run has trained.
        if part.lora.rank and not part.trainable and config.start_from is None:
            yield (
                f"{name}.lora.rank: {part.lora.rank} while {name}.trainable is false: its adapters would stay nothing; "
                "set trainable to true, rank to 0, or start_from to a run that trained them"
            )
        given = part.lora.targets or part.lora.dropout
        if given and not part.lora.rank:
            yield f"{name}.lora.rank: 0, but other fields of {name}.lora are given: give a rank, such as 16"
