"""The loss of a step over all ranks and micro-batches, and the numbers that the log shows of it."""

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
    """What the generative and the value loss count for; the classification loss counts 1."""

    generative: float
    value: float

    @classmethod
    def of(cls, config: Config) -> "LossWeights":
        """lambda of Eq. (3), or 1 where the generative loss is the only one (Eq. 1)."""
        objective = config.objective
        return cls(objective.generative_weight if objective.has_head else 1.0, objective.value_weight)


@dataclass(frozen=True)
class StepStats:
    """What is added up of a step over micro-batches, and then over ranks, in one all-reduce."""

    classification: float = 0.0
    """Of the losses, shares: they add up to means over the whole step."""
    generative: float = 0.0
    value: float = 0.0
    effective_negatives: float = 0.0
    gen_accuracy: float = 0.0
    item_similarity: float = 0.0
    """Mean cosine similarity of item embeddings, of each micro-batch in which it was measured."""
    similarities: float = 0.0
    """Micro-batches in which it was."""
    asked_to_stop: float = 0.0
    """Ranks that were sent SIGTERM: all ranks leave after the same step."""
    failed_saves: float = 0.0
    """Ranks on which the checkpoint in flight has failed: all ranks raise at the same step."""

    def __add__(self, other: "StepStats") -> "StepStats":
        return StepStats(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def to_tensor(self) -> Tensor:
        """The numbers, float64, in the order of the fields."""
        return torch.tensor(astuple(self), dtype=torch.float64)

    @classmethod
    def from_tensor(cls, numbers: Tensor) -> Self:
        """The numbers of `to_tensor`."""
        return cls(*numbers.tolist())

    def over_ranks(self) -> "StepStats":
        """The sum of all ranks'. Collective."""
        return StepStats.from_tensor(global_sum(self.to_tensor()))


def step_counts(batches: list[HybridBatch]) -> tuple[float, float]:
    """(weight of the exposures, generative targets) of a whole step on all ranks; at least 1 each."""
    local = [[float(batch.weights.sum()), float(batch.next_rows.numel())] for batch in batches]
    exposures, targets = global_sum(torch.tensor(local, dtype=torch.float64).sum(0)).tolist()
    return max(exposures, 1.0), max(targets, 1.0)


def micro_batch_loss(
    output: HLLMOutput, counts: tuple[float, float], weights: LossWeights, encodes_items: bool
) -> tuple[Tensor, StepStats]:
    """This rank's and micro-batch's share of Eq. (3): local sums over global counts, so that shares add up.

    encodes_items: whether the item embeddings were made by the present weights.

    Returns:
        The share [], with gradient, and this micro-batch's numbers for `describe_step`.
    """
    classification = output.classification / counts[0]
    value = classification.new_zeros(()) if output.value_error is None else output.value_error / counts[0]
    generative, effective, accuracy = (classification.new_zeros(()) for _ in range(3))
    if output.generative is not None:
        share = output.generative.count / counts[1]
        generative = output.generative.loss_sum / counts[1]
        effective, accuracy = (
            output.generative.effective_negatives * share,
            output.generative.accuracy * share,
        )
    spread, measured = classification.new_zeros(()), 0.0
    if encodes_items and output.items is not None and output.items.shape[0] > 1:
        spread, measured = embedding_spread(output.items), 1.0
    numbers = [classification, generative, value, effective, accuracy, spread]
    loss = classification + weights.generative * generative + weights.value * value
    # One copy from the device for all of them: each would wait for the forward pass by itself.
    shares = torch.stack([number.detach().double() for number in numbers]).tolist()
    return loss, replace(StepStats(*shares), similarities=measured)


def describe_step(stats: StepStats, norm: float, config: Config, alarm: bool) -> dict[str, float]:
    """The losses and statistics of a step as the log has them; `stats`: over all ranks.

    norm: of the gradients, NaN or infinite if one of them is.
    alarm: whether collapsed items are an error yet. A model from scratch begins with much the same embedding
    for every item, and the first steps pull them apart.

    Raises:
        FloatingPointError: the loss or a gradient is not finite, or the item embeddings have collapsed.
    """
    cls, gen, value = stats.classification, stats.generative, stats.value
    weights, objective = LossWeights.of(config), config.objective
    found = {"loss": cls + weights.generative * gen + weights.value * value}
    if objective.has_head:
        found["loss_cls"] = cls
    if weights.generative > 0:
        found |= {"loss_gen": gen, "effective_negatives": stats.effective_negatives, "gen_accuracy": stats.gen_accuracy}
    if weights.value > 0:
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
        found["item_similarity"] = stats.item_similarity / stats.similarities
        if alarm and weights.generative > 0 and found["item_similarity"] > objective.collapse_above:
            raise FloatingPointError(
                f"item embeddings have collapsed: their mean cosine similarity is {found['item_similarity']:.4f} > "
                f"objective.collapse_above {objective.collapse_above}; lower optim.item_llm_lr or raise "
                "objective.generative_weight"
            )
    return found
