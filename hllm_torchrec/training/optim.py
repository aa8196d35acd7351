"""AdamW for the dense parts, clipping of gradients, and the schedule of learning rates, which sharded tables share.

Learning rates are a function of the number of optimizer steps done, so a resumed run needs only that number.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import AdamW

from hllm_torchrec.common.errors import did_you_mean

#: Matches the names of embedding tables (Hugging Face's and TorchRec's names).
_EMBEDDING = re.compile(r"(^|\.)(\w*_)?(embeddings?|embedding_bags|embed_tokens)(\.|$)")


def dense_optimizer(
    named_parameters: Iterable[tuple[str, Parameter]],
    *,
    learning_rate: float,
    part_learning_rates: Mapping[str, float] | None = None,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
) -> AdamW:
    """Build AdamW for the dense parameters, with a learning rate for each part of the model.

    Frozen parameters and those of sharded tables (which have their optimizer in the backward pass) are excluded.
    Weight decay applies to matrices, not to norms, biases, embeddings and parameters with at most one dimension larger
    than 1.

    Args:
        named_parameters: as from `model.named_parameters()`; plain and DTensor parameters may be mixed.
        learning_rate: learning rate of parameters without an entry in `part_learning_rates`.
        part_learning_rates: prefix of parameter names, such as `"item_llm"` -> learning rate; the longest match wins.
        weight_decay: decoupled; a step shrinks a matrix by `learning rate x weight_decay`.
        betas: decay rates of the means of gradients and of squared gradients.

    Returns:
        AdamW with one group for each (part, with or without decay, DTensor or not), each with a `name`.

    Raises:
        ValueError: a prefix matches no parameter, or there is nothing to train.
    """
    parameters = list(named_parameters)
    rates = dict(part_learning_rates or {})
    for prefix in rates:
        if not any(_is_under(name, prefix) for name, _ in parameters):
            parts = sorted({name.split(".")[0] for name, _ in parameters})
            hint = did_you_mean(prefix, parts)
            raise ValueError(f"part_learning_rates: no parameter is under {prefix!r}{hint}; parts: {', '.join(parts)}")
    # DTensors (FSDP2) get groups of their own, because a fused AdamW group cannot mix them with plain tensors.
    groups: dict[tuple[str, bool, bool], list[Parameter]] = defaultdict(list)
    for name, parameter in parameters:
        if parameter.requires_grad and not hasattr(parameter, "_in_backward_optimizers"):
            part = max((prefix for prefix in rates if _is_under(name, prefix)), key=len, default="")
            groups[part, _decays(name, parameter), isinstance(parameter, DTensor)].append(parameter)
    if not groups:
        raise ValueError("there is no dense parameter to train: all are frozen or in sharded tables; unfreeze a part")
    return AdamW(
        [
            {
                "name": f"{part or 'rest'}{'' if decays else ' (no decay)'}",
                "params": members,
                "lr": rates.get(part, learning_rate),
                "weight_decay": weight_decay if decays else 0.0,
            }
            for (part, decays, _), members in groups.items()
        ],
        betas=betas,
        fused=True,  # one pass over memory instead of ten, on CPU too; it cannot mix DTensors and Tensors
    )


def _is_under(name: str, prefix: str) -> bool:
    """True if a dotted name is `prefix` or below it."""
    return name == prefix or name.startswith(f"{prefix}.")


def _decays(name: str, parameter: Parameter) -> bool:
    """True if a parameter has weight decay: a matrix that is not an embedding table."""
    return sum(size > 1 for size in parameter.shape) > 1 and not _EMBEDDING.search(name)


def named_optimizer_state(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Parameter]]
) -> dict[str, dict[str, Tensor]]:
    """Return parameter name -> the optimizer's state tensors, not copies: loading into them restores the optimizer.

    Args:
        optimizer: an optimizer whose state exists (after a step, or `materialize_state`).
        named_parameters: the names to use; parameters that the optimizer does not have are skipped.
    """
    return {name: dict(optimizer.state[p]) for name, p in named_parameters if optimizer.state.get(p)}


def materialize_state(optimizer: AdamW) -> None:
    """Create the state of parameters that have none yet, so that a checkpoint can be loaded into it.

    Weights, gradients, learning rates and existing state do not change; new step counts are 0.
    """
    # AdamW creates its state only in step(). So do one step at learning rate 0, with zero gradients for the parameters
    # without state, and with gradient None for the others, which step() skips.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    new = [p for p in parameters if not optimizer.state.get(p)]
    if not new:
        return
    gradients = [p.grad for p in parameters]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = None
    for parameter in new:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # neither the update nor the decay moves a weight
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    for parameter in new:
        optimizer.state[parameter]["step"].zero_()


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, min_ratio: float) -> float:
    """Return the factor of the learning rate for the update after `step` updates.

    The factor rises linearly from `1 / warmup_steps` (update 0) to 1 (update `warmup_steps - 1`), falls along half a
    cosine to `min_ratio` at `total_steps`, and stays there.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return min_ratio + (1.0 - min_ratio) * (1.0 + math.cos(math.pi * progress)) / 2.0


def dense_step(optimizer: AdamW, clip_norm: float) -> float:
    """Clip the gradients, step if they are finite, and clear them.

    Returns:
        The norm of the gradients before clipping, equal on all ranks.
    """
    norm = float(clip_grad_norm([p for group in optimizer.param_groups for p in group["params"]], clip_norm))
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def clip_grad_norm(parameters: Iterable[Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most `max_norm`. Collective with DTensors.

    The norm of DTensor gradients (FSDP2) is taken over their mesh. Plain gradients are assumed equal on all ranks, as
    after DDP's all-reduce, and count once. `torch.nn.utils.clip_grad_norm_` raises on a mix of the two.

    Args:
        parameters: parameters; those without a gradient are skipped.
        max_norm: the largest norm allowed; 0: measure only.

    Returns:
        The norm before clipping, 0-d, the same on every rank; NaN or infinite if a gradient is.
    """
    by_mesh: dict[Any, list[Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh[mesh].append(parameter)
    # The L2 norm of the groups' L2 norms is the norm of all gradients.
    norms = [_total_norm(members) for members in by_mesh.values()]
    total = torch.nn.utils.get_total_norm(norms)
    if max_norm > 0:
        for members in by_mesh.values():
            torch.nn.utils.clip_grads_with_norm_(members, max_norm, total)
    return total


def _total_norm(parameters: list[Parameter]) -> Tensor:
    """Return the L2 norm of the gradients of parameters that are all plain or all DTensors of one mesh."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
