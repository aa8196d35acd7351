"""Rules of a configuration: ranges of numbers, and constraints between fields (more in `creative` and `objective`)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hllm_torchrec.common.errors import did_you_mean
from hllm_torchrec.common.seconds import second_of
from hllm_torchrec.config.bounds import out_of_bounds
from hllm_torchrec.config.checking import dataclass_problems
from hllm_torchrec.config.creative import CREATIVE_BOUNDS, creative_problems
from hllm_torchrec.config.eval_protocols import protocol_problems
from hllm_torchrec.config.extensions import encoder_shape, shape_bounds
from hllm_torchrec.config.objective import drawn_problems, objective_problems, task_problems
from hllm_torchrec.config.table_optimizers import table_optimizer_problems

if TYPE_CHECKING:
    from hllm_torchrec.config.schema import Config, StageConfig

LLM_SECTIONS = ("item_llm", "user", "creative")
"""Sections that configure an LLM; `user` may configure another sequence model instead."""

LORA_BOUNDS = {
    f"{part}.lora.{name}": bound
    for part in LLM_SECTIONS
    for name, bound in {"rank": ">= 0", "alpha": "> 0", "dropout": ">= 0, < 1"}.items()
}
"""Ranges of the numbers of the low-rank adapters."""

BOUNDS = {
    "seed": ">= 0",
    "max_steps": ">= 0",
    "data.version": ">= 1",
    "data.train_late_after": ">= 1",
    "data.max_history": ">= 2",
    "data.batch_users": ">= 1",
    "data.batch_item_tokens": ">= 0",
    "data.id_dropout": ">= 0, < 1",
    "data.cold_dropout": ">= 0, < 1",
    "data.negative_rate": "> 0, <= 1",
    "data.drawn_negatives.count": ">= 0, <= 100",
    "data.drawn_negatives.top": ">= 1",
    "data.train_users": "> 0, <= 1",
    "data.feedback_delay": ">= 0",
    "data.prefetch": ">= 0",
    "item_llm.layers": ">= 1",
    "item_llm.max_text_length": ">= 1",
    "item_llm.adapter": ">= 0",
    "item_llm.trained_share": "> 0, <= 1",
    "item_llm.refresh_after": ">= 0",
    "item_llm.items_at_once": ">= 0",
    "user.layers": ">= 1",
    "user.dropout": ">= 0, < 1",
    "features.time_depth": ">= 0, <= 6",
    "features.time_width": ">= 1",
    "features.init_scale": ">= 0",
    "features.shard_from_rows": ">= 1",
    "objective.generative_weight": ">= 0",
    "objective.classification_weight": ">= 0",
    "objective.experts": ">= 2",
    "objective.value_weight": ">= 0",
    "objective.negatives": ">= 1",
    "objective.temperature": ">= 0.01",
    "objective.text_similarity": ">= 0",
    "objective.transitions": ">= 0",
    "objective.text_decay": ">= 0, <= 1",
    "objective.mask_cosine_above": "> 0, <= 1",
    "objective.head_hidden": ">= 1",
    "objective.head_dropout": ">= 0, < 1",
    "objective.collapse_above": "> 0, <= 1",
    "optim.lr": ">= 0",
    "optim.item_llm_lr": ">= 0",
    "optim.user_lr": ">= 0",
    "optim.creative_lr": ">= 0",
    "optim.table_lr": ">= 0",
    "optim.weight_decay": ">= 0",
    "optim.warmup": ">= 0, <= 1",
    "optim.min_lr_ratio": ">= 0, <= 1",
    "optim.clip_norm": ">= 0",
    "optim.accumulate": ">= 1",
    "optim.ema": ">= 0, < 1",
    "parallel.timeout": "> 0",
    "evaluation.every": "> 0",
    "evaluation.checkpoint_every": ">= 0",
    "evaluation.patience": ">= 0",
    "evaluation.batch_users": ">= 1",
    "evaluation.keep_last": ">= 1",
    "evaluation.drawn_negatives": ">= 1, <= 100",
    "reliability.max_skipped": ">= 0",
    "reliability.leakage_above": "> 0.5, <= 1",
    **LORA_BOUNDS,
    **CREATIVE_BOUNDS,
}
"""Dotted field -> range of its value; None is always valid."""

STAGE_BOUNDS = {"epochs": "> 0", "max_history": ">= 2", "batch_users": ">= 1"}


def config_problems(config: "Config") -> list[str]:
    """Return all violated rules, each as 'field: value: rule; remedy'."""
    return [
        *out_of_bounds(config, BOUNDS),
        *_stage_problems(config.stages),
        *_start_problems(config),
        *_length_problems(config),
        *_moment_problems(config),
        *_optimizer_problems(config),
        *_feature_name_problems(config),
        *_open_table_problems(config),
        *_store_problems(config),
        *_evidence_problems(config),
        *_backbone_problems(config),
        *lora_problems(config),
        *_encoder_problems(config),
        *objective_problems(config),
        *creative_problems(config),
        *task_problems(config),
        *drawn_problems(config),
        *protocol_problems(config),
    ]


def _stage_problems(stages: "tuple[StageConfig, ...]") -> Iterator[str]:
    if not stages:
        yield "stages: empty: give at least one, e.g. [{name: end to end, epochs: 1}]"
    for number, stage in enumerate(stages):
        yield from out_of_bounds(stage, STAGE_BOUNDS, f"stages[{number}].")


def _start_problems(config: "Config") -> Iterator[str]:
    for name in ("start_from_optimizer", "start_from_skip"):
        if getattr(config, name) and config.start_from is None:
            yield f"{name}: {getattr(config, name)}: no run to start from; name it in start_from, or leave it out"
    if config.features.new_rows == "neighbors" and not (config.item_llm.enabled or config.data.item_features):
        yield "features.new_rows: 'neighbors': items have neither text nor features to compare; choose noise or unknown"


def _length_problems(config: "Config") -> Iterator[str]:
    alpha = config.data.stochastic_length
    if alpha != 0 and not 1 < alpha <= 2:
        yield f"data.stochastic_length: {alpha}: must be 0 (off), or above 1 and at most 2; the paper has 1.6 to 1.9"


def _moment_problems(config: "Config") -> Iterator[str]:
    try:
        second_of(config.data.train_since or 0)
    except ValueError as error:
        yield f"data.train_since: {error}"
    if config.data.train_late_after is not None and config.data.train_since is None:
        yield "data.train_late_after: needs data.train_since, because only older events can be late; give both"


TIMES = ("time_year", "time_month", "time_day", "time_hour", "time_minute", "time_second")
"""Copy of the names in `modules.features.timestamps.TIME_FEATURES`, because importing that module needs torch."""
OWN_TABLES = ("item_id", "action", "action_gate", *TIMES)
"""Names of the model's own tables. Recipes choose no feature with such a name; `_feature_name_problems` refuses only
the names that the configuration uses."""


def _feature_name_problems(config: "Config") -> Iterator[str]:
    """Yield a problem for each feature whose name is that of another table, or is not a valid name of a table."""
    features, data = config.features, config.data
    used = {"item_id": features.item_id, "action": features.action, "action_gate": features.action_gate}
    own = {name for name, is_used in used.items() if is_used} | {*TIMES[: features.time_depth]}
    own |= {f"context_{name}" for name in data.context}
    for kind, names in (("item_features", data.item_features), ("user_features", data.user_features)):
        for name in names:
            if name in own:
                yield (
                    f"data.{kind}: {name!r} is the name of another table of the model: leave it out, or rename the "
                    "column"
                )
            elif "." in name:
                yield f"data.{kind}: {name!r}: the name of a table has no dot: leave it out, or rename the column"
            own.add(name)


OPEN_TABLE_BOUNDS = {"rows": ">= 1", "evict_after": ">= 1"}


def _open_table_problems(config: "Config") -> Iterator[str]:
    from hllm_torchrec.config.schema import OpenTableConfig

    features, data = config.features, config.data
    own = {"item_id": features.item_id, "action": features.action}
    known = [*(name for name, used in own.items() if used), *data.item_features, *data.user_features]
    for name, content in features.tables.items():
        field = f"features.tables.{name}"
        if name not in known:
            yield f"{field}: no feature of this model{did_you_mean(name, known)}; it has {', '.join(known) or 'none'}"
        problems = list(dataclass_problems(content, OpenTableConfig, field))
        yield from problems or out_of_bounds(OpenTableConfig(**content), OPEN_TABLE_BOUNDS, f"{field}.")


def _optimizer_problems(config: "Config") -> Iterator[str]:
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        yield f"optim.betas: {list(config.optim.betas)}: each must be at least 0 and less than 1, such as [0.9, 0.98]"
    yield from table_optimizer_problems(config.optim.table_optimizer, config.optim.table_options)


def _evidence_problems(config: "Config") -> Iterator[str]:
    """Yield a problem for evidence without a head, and for text evidence without fixed text embeddings."""
    names, item = config.data.evidence, config.item_llm
    if names and not config.objective.has_head:
        yield f"data.evidence: {list(names)}: objective.fusion 'none' has no head that reads it; leave it out"
    if "neighbors" in names and not item.enabled:
        yield "data.evidence: 'neighbors' compares texts, and item_llm.enabled is false; leave it out"
    read = [name for name in ("neighbors", "tastes") if name in names]
    if read and item.enabled and (item.trainable or takes_stored_items(config)):
        yield (
            f"data.evidence: '{read[0]}' needs text embeddings that do not change: set item_llm.trainable to false, "
            "without item_embeddings: stored, or leave it out"
        )


def takes_stored_items(config: "Config") -> bool:
    """Return True if item embeddings come from `item_llm.store`; a run uses the store in all stages or in none."""
    return any(stage.item_embeddings == "stored" for stage in config.stages)


def _store_problems(config: "Config") -> Iterator[str]:
    """Yield missing requirements of stages with stored item embeddings, and fields that only such stages use."""
    item = config.item_llm
    if not takes_stored_items(config):
        for name, value, nothing in (("store", item.store, None), ("adapter", item.adapter, 0)):
            if value != nothing:
                yield (
                    f"item_llm.{name}: {value!r}: no stage has item_embeddings: stored; write that in all stages, or "
                    f"leave item_llm.{name} out"
                )
        return
    for number, stage in enumerate(config.stages):
        if stage.item_embeddings != "stored":
            yield (
                f"stages[{number}].item_embeddings: {stage.item_embeddings!r}: other stages have 'stored': all stages "
                "of a run read the store, or none; make two runs, the second with start_from"
            )
    if not item.enabled:
        yield "item_llm.enabled: false while stages have item_embeddings: stored: an ID-only model reads no store"
    elif item.store is None:
        yield "item_llm.store: none: item_embeddings: stored needs the store that `hllm embed` has made"


def _backbone_problems(config: "Config") -> Iterator[str]:
    for name in LLM_SECTIONS:
        part = getattr(config, name)
        if part.has_backbone and (part.pretrained is None) == (part.shape is None):
            without = ", or item_llm.enabled: false for a model without texts" if name == "item_llm" else ""
            yield (
                f"{name}: pretrained={part.pretrained!r}, shape={part.shape!r}: give one of them "
                f"(weights, or a shape for random ones){without}"
            )
    if config.item_llm.quantization != "none":
        yield from _quantization_problems(config)
    if config.item_llm.whiten and config.item_llm.standardise:
        yield "item_llm.standardise: true with item_llm.whiten, which standardises too; leave one of them out"


def _quantization_problems(config: "Config") -> Iterator[str]:
    item, parallel = config.item_llm, config.parallel
    if item.trainable:
        yield (
            f"item_llm.quantization: {item.quantization}: quantized weights cannot be trained; set item_llm.trainable "
            "to false, or write none"
        )
    if parallel.precision != "fp32" or parallel.dense != "ddp":
        yield (
            f"item_llm.quantization: {item.quantization}: parallel.precision is {parallel.precision}, parallel.dense "
            f"{parallel.dense}: int8 needs float32 inputs and unsharded weights; write fp32 and ddp, or none"
        )
    if item.lora.rank:
        yield (
            f"item_llm.quantization: {item.quantization}: item_llm.lora.rank is {item.lora.rank}: adapters are not "
            "quantized; write 0, or none"
        )


def _encoder_problems(config: "Config") -> Iterator[str]:
    """Yield problems of `user`: of interleaved actions, and of encoders other than a Hugging Face decoder."""
    user, tokens = config.user, 1
    if user.actions == "interleaved":
        tokens = 2
        if not config.features.action:
            yield "user.actions: 'interleaved' while features.action is false: there are no actions; set it true"
        if config.features.action_gate:
            yield (
                "user.actions: 'interleaved' with features.action_gate: an item's token comes before its action and "
                "cannot be scaled by it; set the gate to false, or write summed"
            )
    if user.has_backbone:
        return
    for name in ("pretrained", "layers"):
        if getattr(user, name) is not None:
            yield f"user.{name}: {getattr(user, name)!r}: only for user.encoder llm; leave it out"
    try:
        kind = encoder_shape(user.encoder)
    except ValueError as error:
        yield str(error)
        return
    problems = list(dataclass_problems(user.shape or {}, kind, "user.shape"))
    yield from problems
    if problems:  # a shape with wrong keys or types cannot be built for the checks below
        return
    shape = kind(**(user.shape or {}))
    yield from out_of_bounds(shape, shape_bounds(user.encoder, shape), "user.shape.")
    # With interleaved actions an event is two tokens, and position tables count tokens.
    longest = tokens * max(config.data.max_history, *(stage.max_history or 0 for stage in config.stages), 0)
    # The Shape of a custom encoder may lack these fields; the defaults of `getattr` then disable the checks.
    bound = getattr(shape, "bounds_history", True)
    if bound and getattr(shape, "max_positions", longest) < longest:
        yield (
            f"user.shape.max_positions: {shape.max_positions}: must be at least the longest history, {longest} "
            f"(data.max_history or a stage's{', in tokens' if tokens > 1 else ''})"
        )
    if getattr(shape, "count_from", "start") == "end" and config.objective.has_head:
        yield (
            "user.shape.count_from: 'end': only with objective.fusion none: queries see histories of many lengths; "
            "write start"
        )
    if getattr(shape, "prefix_mask", "context") == "history":
        yield (
            "user.shape.prefix_mask: 'history': training and evaluation read many moments of a history in one "
            "pass, and each would see the future through the context; write context (history is for models built in "
            "Python)"
        )
    if getattr(shape, "time_of", "event") == "next" and config.objective.has_head:
        yield (
            "user.shape.time_of: 'next': only with objective.fusion none: the time of the next event, which is to be "
            "classified, would be known to the history; write event"
        )


def lora_problems(config: "Config") -> Iterator[str]:
    """Yield a problem for adapters without a Hugging Face model, and for adapters that would never be trained."""
    item, user = config.item_llm, config.user
    if item.lora.rank and not item.enabled:
        yield (
            f"item_llm.lora.rank: {item.lora.rank} while item_llm.enabled is false: there is no LLM to adapt; write 0"
        )
    if user.lora.rank and not user.has_backbone:
        yield (
            f"user.lora.rank: {user.lora.rank}: user.encoder {user.encoder!r} is not a Hugging Face decoder; write "
            "0, or user.encoder llm"
        )
    for name in LLM_SECTIONS:
        part = getattr(config, name)
        # Frozen adapters are valid if another run has trained them: they come with its weights.
        if part.lora.rank and not part.trainable and config.start_from is None:
            yield (
                f"{name}.lora.rank: {part.lora.rank} while {name}.trainable is false: its adapters would never be "
                "trained; set trainable to true, rank to 0, or start_from to a run that trained them"
            )
        given = part.lora.targets or part.lora.dropout
        if given and not part.lora.rank:
            yield f"{name}.lora.rank: 0, but other fields of {name}.lora are given: give a rank, such as 16"
