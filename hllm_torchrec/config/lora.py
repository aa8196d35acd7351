"""Configuration of low-rank adapters."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on an LLM with frozen base weights: W x + alpha / rank * B A x."""

    rank: int = 0
    """Rank of the adapters; 0: no adapters, the LLM's weights are trained."""
    alpha: float = 16.0
    """Scale of the update alpha / rank * B A x. B is initialized to zero, so the initial update is zero."""
    dropout: float = 0.0
    """Dropout probability of the adapter input."""
    targets: tuple[str, ...] = ()
    """Linear layers that get adapters, by the last component of their name, such as [q_proj, v_proj]; empty: all linear
    layers of the LLM."""
