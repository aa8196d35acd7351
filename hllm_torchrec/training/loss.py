"""Loss of a step over all ranks and micro-batches, and its statistics for the log."""

import math
from dataclasses import astuple, dataclass, replace
from typing import Self

import torch
from torch import Tensor

from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.distributed.collectives import global_sum
from hllm_torchrec.models.hllm import HLLMOutput
from hllm_torchrec.modules.losses.objectives import embedding_spread


@dataclass(frozen=True)
class LossWeights:
    """Weights of the generative, the value and the creative losses; the classification loss has weight 1."""

    generative: float
    value: float
    write: float = 0.0
    match: float = 0.0

    @classmethod
    def of(cls, config: Config) -> "LossWeights":
        """Weights of a configuration: lambda of Eq. (3), or 1 if the generative loss is the only one (Eq. 1)."""
        objective = config.objective
        creative = config.creative.losses if config.creative.enabled else None
        return cls(
            objective.generative_weight if objective.has_head else 1.0,
            objective.value_weight,
            creative.write if creative else 0.0,
            creative.match if creative else 0.0,
        )


@dataclass(frozen=True)
class StepStats:
    """Statistics of a step, summed over micro-batches and then over ranks in one all-reduce."""

    classification: float = 0.0
    """Shares of the mean losses (local sum / global count): their sum is the mean over the complete step."""
    generative: float = 0.0
    value: float = 0.0
    effective_negatives: float = 0.0
    gen_accuracy: float = 0.0
    item_similarity: float = 0.0
    """Sum over micro-batches of the mean cosine similarity of item embeddings, where it was measured."""
    similarities: float = 0.0
    """Number of micro-batches in which `item_similarity` was measured."""
    asked_to_stop: float = 0.0
    """Number of ranks that received SIGTERM: all ranks stop after the same step."""
    failed_saves: float = 0.0
    """Number of ranks on which the pending checkpoint has failed: all ranks raise at the same step."""
    write: float = 0.0
    """Shares of the creative losses, as of the others."""
    match: float = 0.0
    user_similarity: float = 0.0
    """As `item_similarity`, of the user vectors of creatives."""
    user_similarities: float = 0.0

    def __add__(self, other: "StepStats") -> "StepStats":
        return StepStats(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def to_tensor(self) -> Tensor:
        """The values as float64, in the order of the fields."""
        return torch.tensor(astuple(self), dtype=torch.float64)

    @classmethod
    def from_tensor(cls, numbers: Tensor) -> Self:
        """Inverse of `to_tensor`."""
        return cls(*numbers.tolist())

    def over_ranks(self) -> "StepStats":
        """Sum over all ranks. Collective."""
        return StepStats.from_tensor(global_sum(self.to_tensor()))


@dataclass(frozen=True)
class StepCounts:
    """Denominators of a complete step on all ranks, at least 1 each: weight of the exposures, generative targets,
    weighted tokens of responses, and pairs of users and items to match."""

    exposures: float
    targets: float
    tokens: float = 1.0
    pairs: float = 1.0


def step_counts(batches: list[HybridBatch]) -> StepCounts:
    """Counts of a step. Collective."""
    # Global counts, not this rank's: ranks and micro-batches hold different numbers of samples, and each counts once.
    local = [
        [float(batch.weights.sum()), float(batch.next_rows.numel()), *_creative_counts(batch)] for batch in batches
    ]
    return StepCounts(*(max(one, 1.0) for one in global_sum(torch.tensor(local, dtype=torch.float64).sum(0)).tolist()))


def _creative_counts(batch: HybridBatch) -> tuple[float, float]:
    return (0.0, 0.0) if batch.creative is None else (batch.creative.token_weight, batch.creative.pairs)


def micro_batch_loss(
    output: HLLMOutput, counts: StepCounts, weights: LossWeights, encodes_items: bool
) -> tuple[Tensor, StepStats]:
    """Share of Eq. (3) of this rank and micro-batch: local sums over global counts, so that shares add up.

    encodes_items: True if the item embeddings were computed with the current weights.

    Returns:
        The share [], with gradient, and the statistics of this micro-batch for `describe_step`.
    """
    classification = output.classification / counts.exposures
    value = classification.new_zeros(()) if output.value_error is None else output.value_error / counts.exposures
    generative, effective, accuracy = (classification.new_zeros(()) for _ in range(3))
    if output.generative is not None:
        # These two are means over this micro-batch's targets, so they are weighted by its share of the targets.
        share = output.generative.count / counts.targets
        generative = output.generative.loss_sum / counts.targets
        effective, accuracy = (
            output.generative.effective_negatives * share,
            output.generative.accuracy * share,
        )
    write, match, user_spread, users_measured = *(classification.new_zeros(()) for _ in range(3)), 0.0
    if output.creative is not None:
        write, match = output.creative.write / counts.tokens, output.creative.match / counts.pairs
        if output.creative.spread is not None:
            user_spread, users_measured = output.creative.spread, 1.0
    spread, measured = classification.new_zeros(()), 0.0
    if encodes_items and output.items is not None and output.items.shape[0] > 1:
        spread, measured = embedding_spread(output.items), 1.0
    numbers = [classification, generative, value, effective, accuracy, spread, write, match, user_spread]
    loss = classification + weights.generative * generative + weights.value * value
    if output.creative is not None:
        loss = loss + weights.write * write + weights.match * match
    # One copy from the device for all values, because every copy waits for the forward pass.
    shares = torch.stack([number.detach().double() for number in numbers]).tolist()
    stats = StepStats(*shares[:6], similarities=measured)
    of_creatives = dict(zip(("write", "match", "user_similarity"), shares[6:], strict=True))
    return loss, replace(stats, **of_creatives, user_similarities=users_measured)


def describe_step(stats: StepStats, norm: float, config: Config, alarm: bool) -> dict[str, float]:
    """Losses and statistics of a step for the log; `stats`: over all ranks.

    norm: gradient norm, NaN or infinite if a gradient is.
    alarm: True if collapsed items are an error. A model from scratch starts with nearly equal embeddings for all
    items, which the first steps separate.

    Raises:
        FloatingPointError: the loss or a gradient is not finite, or the item embeddings have collapsed.
    """
    cls, gen, value = stats.classification, stats.generative, stats.value
    weights, objective = LossWeights.of(config), config.objective
    found = {"loss": cls + weights.generative * gen + weights.value * value}
    if config.creative.enabled:
        found = _describe_creatives(stats, weights)
    elif objective.has_head:
        found["loss_cls"] = cls
    if weights.generative > 0 and not config.creative.enabled:
        found |= {"loss_gen": gen, "effective_negatives": stats.effective_negatives, "gen_accuracy": stats.gen_accuracy}
    if weights.value > 0 and not config.creative.enabled:
        found["loss_value"] = value
    if not math.isfinite(found["loss"]):
        raise FloatingPointError(
            f"the loss is {found['loss']}: lower optim.lr or optim.table_lr, or set optim.clip_norm above 0"
        )
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the norm of the gradients is {norm} at a loss of {found['loss']:.6g}: lower optim.lr or optim.table_lr"
        )
    if stats.similarities:
        # A cosine: rounding must not carry it above 1, which `collapse_above: 1.0` allows.
        found["item_similarity"] = min(stats.item_similarity / stats.similarities, 1.0)
        if alarm and weights.generative > 0 and found["item_similarity"] > objective.collapse_above:
            raise FloatingPointError(
                f"item embeddings have collapsed: their mean cosine similarity is {found['item_similarity']:.4f} > "
                f"objective.collapse_above {objective.collapse_above}; lower optim.item_llm_lr or raise "
                "objective.generative_weight"
            )
    if alarm and found.get("user_similarity", 0.0) > objective.collapse_above:
        raise FloatingPointError(
            f"user vectors have collapsed: the mean cosine similarity of a step's is {found['user_similarity']:.4f} > "
            f"objective.collapse_above {objective.collapse_above}; lower optim.user_lr, or set user.trainable to false"
        )
    return found


def _describe_creatives(stats: StepStats, weights: LossWeights) -> dict[str, float]:
    """Losses of a step of creatives for the log."""
    found = {
        "loss": weights.write * stats.write + weights.match * stats.match,
        "loss_write": stats.write,
    }
    if weights.match > 0:
        found["loss_match"] = stats.match
    if stats.user_similarities:
        found["user_similarity"] = min(stats.user_similarity / stats.user_similarities, 1.0)
    return found
