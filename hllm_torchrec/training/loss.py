"""Loss of a step over all ranks and micro-batches, and statistics of the step for the log."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from itertools import zip_longest
from typing import Any, Self

import torch
from torch import Tensor

from hllm_torchrec.config.creative import CreativeLossConfig
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.distributed.collectives import global_sum
from hllm_torchrec.models.hllm_output import HLLMOutput
from hllm_torchrec.modules.losses.objectives import mean_cosine


@dataclass(frozen=True)
class LossWeights:
    """Weights of the parts of the loss.

    tasks: task name -> weight within the classification loss; write, match, recon, align: weights of the losses of
    creatives.
    """

    generative: float
    value: float
    classification: float = 1.0
    tasks: Mapping[str, float] = field(default_factory=dict)
    write: float = 0.0
    match: float = 0.0
    recon: float = 0.0
    align: float = 0.0

    @classmethod
    def of(cls, config: Config) -> "LossWeights":
        """Weights of a configuration: lambda of Eq. (3), or 1 if the generative loss is the only one (Eq. 1)."""
        objective = config.objective
        generative = objective.generative_weight if objective.has_head else 1.0
        tasks = {name: task.weight for name, task in objective.task_configs.items()}
        creative = config.creative.losses if config.creative.enabled else CreativeLossConfig(write=0.0)
        return cls(
            generative,
            objective.value_weight,
            objective.classification_weight,
            tasks,
            creative.write,
            creative.match,
            creative.recon,
            creative.align,
        )


@dataclass(frozen=True)
class StepStats:
    """Statistics of a step, summed over micro-batches and then over ranks in one all-reduce."""

    classification: float = 0.0
    """Classification loss: local sum / global count, so that the sum over micro-batches and ranks is the mean of the
    step. `generative` and `value` likewise."""
    generative: float = 0.0
    value: float = 0.0
    effective_negatives: float = 0.0
    gen_accuracy: float = 0.0
    item_similarity: float = 0.0
    """Mean cosine similarity of item embeddings, summed over the micro-batches in which it was measured."""
    similarities: float = 0.0
    """Number of micro-batches in which `item_similarity` was measured."""
    asked_to_stop: float = 0.0
    """Number of ranks that received SIGTERM or SIGINT: all ranks stop after the same step."""
    failed_saves: float = 0.0
    """Number of ranks on which the pending checkpoint has failed: all ranks raise at the same step."""
    write: float = 0.0
    """Creative loss as local sum / global count, like `classification`; `match`, `recon` and `align` likewise."""
    match: float = 0.0
    user_similarity: float = 0.0
    """Like `item_similarity`, for the user vectors of creatives."""
    user_similarities: float = 0.0
    recon: float = 0.0
    align: float = 0.0
    align_negatives: float = 0.0
    """Mean number of negatives of a creative in the align loss: rows of other users."""
    tasks: tuple[float, ...] = ()
    """Loss of each task as local sum / global count, like `classification`; empty for a single task."""

    def __add__(self, other: "StepStats") -> "StepStats":
        tasks = [a + b for a, b in zip_longest(self.tasks, other.tasks, fillvalue=0.0)]
        return StepStats._of([a + b for a, b in zip(self._numbers(), other._numbers(), strict=True)], tasks)

    @classmethod
    def _of(cls, numbers: Sequence[float], tasks: Sequence[float]) -> Self:
        """Build from the values of all fields except `tasks`, in order, and the values of `tasks`."""
        named: dict[str, Any] = {field.name: value for field, value in zip(fields(cls), numbers, strict=False)}
        return cls(**named, tasks=tuple(tasks))

    def _numbers(self) -> tuple[float, ...]:
        """Values of all fields except `tasks`, in order."""
        return astuple(self)[:-1]

    def to_tensor(self) -> Tensor:
        """Values of all fields as a float64 tensor, in order; those of `tasks` last."""
        return torch.tensor([*self._numbers(), *self.tasks], dtype=torch.float64)

    @classmethod
    def from_tensor(cls, numbers: Tensor) -> Self:
        """Inverse of `to_tensor`."""
        values, single = numbers.tolist(), len(fields(cls)) - 1
        return cls._of(values[:single], values[single:])

    def over_ranks(self) -> "StepStats":
        """Sum over all ranks. Collective."""
        return StepStats.from_tensor(global_sum(self.to_tensor()))


@dataclass(frozen=True)
class StepCounts:
    """Divisors of the losses of a step, summed over all ranks and micro-batches; each is above 0.

    tasks: weight of the exposures, for each task; targets: number of generative targets; tokens: weighted tokens of
    responses; pairs: user-item pairs of the match loss; profile_tokens: weighted tokens of profiles; creatives: number
    of creatives. labelled: for each task, whether the weight of its exposures is above 0; its divisor is 1 otherwise.
    """

    tasks: tuple[float, ...]
    targets: float
    tokens: float = 1.0
    pairs: float = 1.0
    profile_tokens: float = 1.0
    creatives: float = 1.0
    labelled: tuple[bool, ...] = ()


def step_counts(batches: list[HybridBatch]) -> StepCounts:
    """The counts of a step, summed over its micro-batches and all ranks. Collective."""
    # Global counts: ranks and micro-batches have different numbers of samples, and the weight of a sample must not
    # depend on which of them has it.
    local = []
    for batch in batches:
        weights = batch.weights[:, None] if batch.task_weights is None else batch.task_weights
        local.append([*weights.sum(0).tolist(), float(batch.next_rows.numel()), *_creative_counts(batch)])
    found = global_sum(torch.tensor(local, dtype=torch.float64).sum(0)).tolist()
    counts = [count or 1.0 for count in found]
    targets, tokens, pairs, profile_tokens, creatives = counts[-5:]
    labelled = tuple(count > 0 for count in found[:-5])
    return StepCounts(tuple(counts[:-5]), targets, tokens, pairs, profile_tokens, creatives, labelled)


def _creative_counts(batch: HybridBatch) -> tuple[float, float, float, float]:
    if (creative := batch.creative) is None:
        return 0.0, 0.0, 0.0, 0.0
    return creative.token_weight, creative.pairs, creative.profile_weight, float(creative.rows.numel())


def micro_batch_loss(
    output: HLLMOutput, counts: StepCounts, weights: LossWeights, encodes_items: bool
) -> tuple[Tensor, StepStats]:
    """Compute the part of HLLM's Eq. (3) of this rank's micro-batch: local sums / global counts.

    The sum of these parts over micro-batches and ranks is the loss of the step. encodes_items: True if the item
    embeddings were computed with the current weights.

    Returns:
        The part of the loss [], with gradient, and the statistics of this micro-batch for `describe_step`.
    """
    means = {name: loss.trained / count for (name, loss), count in zip(output.tasks.items(), counts.tasks, strict=True)}
    terms = [mean if (weight := weights.tasks.get(name, 1.0)) == 1.0 else weight * mean for name, mean in means.items()]
    classification = terms[0]
    for term in terms[1:]:
        classification = classification + term
    value = classification.new_zeros(()) if output.value_error is None else output.value_error / counts.tasks[0]
    generative, effective, accuracy = (classification.new_zeros(()) for _ in range(3))
    if output.generative is not None:
        # `effective_negatives` and `accuracy` are means over this micro-batch's targets, so they are weighted by the
        # micro-batch's share of the targets.
        share = output.generative.count / counts.targets
        generative = output.generative.loss_sum / counts.targets
        effective, accuracy = (
            output.generative.effective_negatives * share,
            output.generative.accuracy * share,
        )
    write, match, recon, align, negatives, user_similarity = (classification.new_zeros(()) for _ in range(6))
    users_measured = 0.0
    if (creative := output.creative) is not None:
        write, match = creative.write / counts.tokens, creative.match / counts.pairs
        recon, align = creative.recon / counts.profile_tokens, creative.align / counts.creatives
        negatives = creative.negatives / counts.creatives
        if creative.mean_cosine is not None:
            user_similarity, users_measured = creative.mean_cosine, 1.0
    similarity, measured = classification.new_zeros(()), 0.0
    if encodes_items and output.items is not None and output.items.shape[0] > 1:
        similarity, measured = mean_cosine(output.items), 1.0
    numbers = [classification, generative, value, effective, accuracy, similarity]
    loss = weights.classification * classification + weights.generative * generative + weights.value * value
    if output.creative is not None:
        loss = loss + weights.write * write + weights.match * match
        if weights.recon or weights.align:
            loss = loss + weights.recon * recon + weights.align * align
    if len(means) > 1:
        numbers += [loss.raw / count for loss, count in zip(output.tasks.values(), counts.tasks, strict=True)]
    # One copy from the device for all values, because every copy waits for the forward pass.
    of_creatives = {"write": write, "match": match, "recon": recon, "align": align}
    of_creatives |= {"align_negatives": negatives, "user_similarity": user_similarity}
    numbers = [*of_creatives.values(), *numbers]
    # Order: the numbers of creatives, then the first six fields of StepStats, then one number per task.
    shares = torch.stack([number.detach().double() for number in numbers]).tolist()
    stats = replace(StepStats._of(shares[6:12], shares[12:]), similarities=measured, user_similarities=users_measured)
    return loss, replace(stats, **dict(zip(of_creatives, shares, strict=False)))


def describe_step(
    stats: StepStats, norm: float, config: Config, alarm: bool, task_names: Sequence[str] = ()
) -> dict[str, float]:
    """Losses and statistics of a step for the log.

    stats: sums over all ranks. norm: gradient norm, NaN or infinite if a gradient is. alarm: True if collapsed item
    embeddings are an error (not in the first steps: a model from scratch starts with nearly equal embeddings for all
    items). task_names: names of the tasks in `stats.tasks`, in order.

    Raises:
        FloatingPointError: the loss or a gradient is not finite, or the item embeddings have collapsed.
    """
    cls, gen, value = stats.classification, stats.generative, stats.value
    weights, objective = LossWeights.of(config), config.objective
    found = {"loss": weights.classification * cls + weights.generative * gen + weights.value * value}
    if config.creative.enabled:
        # If the mean user vector is subtracted (normalize), a large common part of the user vectors does no harm.
        alarm = alarm and config.creative.soft.normalize == "none"
        return _describe_creatives(stats, weights, norm, objective.collapse_above if alarm else math.inf)
    if objective.has_head:
        found["loss_cls"] = cls
    found |= {f"loss_{name}": loss for name, loss in zip(task_names, stats.tasks, strict=True)}
    if weights.generative > 0:
        found |= {"loss_gen": gen, "effective_negatives": stats.effective_negatives, "gen_accuracy": stats.gen_accuracy}
    if weights.value > 0:
        found["loss_value"] = value
    _check_finite(found["loss"], norm)
    if stats.similarities:
        # Rounding may lift a mean of cosines above 1; with `collapse_above: 1.0` (no limit) that would raise.
        found["item_similarity"] = min(stats.item_similarity / stats.similarities, 1.0)
        if alarm and weights.generative > 0 and found["item_similarity"] > objective.collapse_above:
            raise FloatingPointError(
                f"item embeddings have collapsed: their mean cosine similarity is {found['item_similarity']:.4f} > "
                f"objective.collapse_above {objective.collapse_above}; lower optim.item_llm_lr or raise "
                "objective.generative_weight"
            )
    return found


def _describe_creatives(stats: StepStats, weights: LossWeights, norm: float, collapse_above: float) -> dict[str, float]:
    """Losses and statistics of a step with creatives, which has no other losses.

    Raises:
        FloatingPointError: as `describe_step` (of user vectors instead of item embeddings), or the align loss has no
            negatives.
    """
    found = {"loss": weights.write * stats.write + weights.match * stats.match, "loss_write": stats.write}
    if weights.match > 0:
        found["loss_match"] = stats.match
    if weights.recon > 0:
        found["loss"] += weights.recon * stats.recon
        found["loss_recon"] = stats.recon
    if weights.align > 0:
        found["loss"] += weights.align * stats.align
        found |= {"loss_align": stats.align, "align_negatives": stats.align_negatives}
    _check_finite(found["loss"], norm)
    if weights.align > 0 and not stats.align_negatives:
        raise FloatingPointError(
            "creative.losses.align: all creatives of the step are of one user, so there are no negatives; "
            "raise creative.per_batch, or write align: 0"
        )
    if stats.user_similarities:
        found["user_similarity"] = min(stats.user_similarity / stats.user_similarities, 1.0)
        if found["user_similarity"] > collapse_above:
            raise FloatingPointError(
                f"user vectors have collapsed: their mean cosine similarity is {found['user_similarity']:.4f} > "
                f"objective.collapse_above {collapse_above}; lower optim.user_lr, or set "
                "creative.soft.normalize to standardize"
            )
    return found


def _check_finite(loss: float, norm: float) -> None:
    """Raise FloatingPointError if the loss or the norm of the gradients is not finite."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss}: lower optim.lr or optim.table_lr, or set optim.clip_norm above 0"
        )
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the norm of the gradients is {norm} at a loss of {loss:.6g}: lower optim.lr or optim.table_lr"
        )
