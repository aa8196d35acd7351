"""Exponential moving average of the dense weights."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter


class EmaWeights:
    """Exponential moving average of dense weights, used for evaluation.

    Each update is average = d x average + (1 - d) x weight. The decay d is limited to (1 + step) / (10 + step), so that
    the influence of the initial weights on early averages vanishes quickly.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Parameter]], decay: float) -> None:
        """Start from the current weights of all trainable parameters that are not in sharded tables.

        Raises:
            ValueError: `decay` is not in [0, 1).
        """
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema decay is {decay}; it must be at least 0 and less than 1, such as 0.999")
        self._decay = decay
        self._parameters = {
            name: p for name, p in named_parameters if p.requires_grad and not hasattr(p, "_in_backward_optimizers")
        }
        self._averages = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages with the current weights; step: number of optimizer steps done."""
        # One parameter at a time, because torch.optim.swa_utils rejects a mix of Tensors and DTensors (FSDP2).
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, parameter in self._parameters.items():
            self._averages[name].lerp_(parameter.detach(), 1.0 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Context manager: the model has the averages inside the block, and its previous weights afterwards."""
        previous = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._copy(self._averages)
        try:
            yield
        finally:
            self._copy(previous)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        """Copy values into the parameters of the same names."""
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    @torch.no_grad()
    def restart(self) -> None:
        """Reset the averages to the current weights."""
        for name, parameter in self._parameters.items():
            self._averages[name].copy_(parameter.detach())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages (not copies): loading into these tensors in place restores this object."""
        return dict(self._averages)
