"""Published retrieval protocols: their requirements on a configuration, checked before training.

leave_one_out   The HLLM paper, section 4.1, and SASRec: each user's last event is the test target and the
                second-to-last the validation target. The model is trained on the other events and selected on the
                validation targets.
ml1m_hstu       Meta's README for MovieLens-1M: trained on all events except the last for a fixed number of epochs,
                tested on the last event. The validation targets are part of training, so nothing may be selected
                by them: select with `leave_one_out`, then train again and test once.

In both protocols every event is a target regardless of its rating, and the complete catalogue is ranked except the
user's history (`evaluation.filter_seen`, on in both publications).
"""

import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hllm_torchrec.config.schema import Config

EVERY_EVENT: dict[str, Any] = {
    "objective.positive_targets_only": False,
    "data.history": "all",
    "evaluation.filter_seen": True,
}
PROTOCOLS: dict[str, dict[str, Any]] = {
    "leave_one_out": {**EVERY_EVENT, "data.train_part": "train"},
    "ml1m_hstu": {**EVERY_EVENT, "data.train_part": "train_and_valid"},
}
"""Protocol -> dotted field -> required value."""

SPLIT_RULE = "leave_one_out"
"""Split rule required by every protocol."""


def protocol_problems(config: "Config") -> Iterator[str]:
    """Yield violations of the configuration's protocol, and checkpoint selection on targets that are trained on."""
    protocol = config.evaluation.protocol
    for name, wanted in PROTOCOLS.get(protocol or "", {}).items():
        value = operator.attrgetter(name)(config)
        if value != wanted:
            yield f"{name}: {value!r}: must be {wanted!r} under evaluation.protocol {protocol}"
    if config.data.train_part == "train_and_valid":
        epochs = sum(stage.epochs for stage in config.stages)
        if config.evaluation.every < epochs or config.evaluation.patience > 0:
            yield (
                f"evaluation.every: {config.evaluation.every}: must be at least the {epochs:g} epochs of all stages, "
                "with evaluation.patience 0, while data.train_part is train_and_valid: no checkpoint may be chosen "
                "by targets that were trained on"
            )


def delay_problems(feedback_delay: int, manifest: dict[str, Any]) -> Iterator[str]:
    """Yield a problem if a feedback delay is set for a dataset whose visible events are determined by position."""
    rule = manifest["split"]["rule"]
    why = "has no timestamps" if not manifest.get("has_timestamps", True) else f"is split by {rule!r}"
    if feedback_delay and (rule == SPLIT_RULE or not manifest.get("has_timestamps", True)):
        yield f"feedback_delay: {feedback_delay}: the dataset {why}, so events are seen by position; write 0"


def dataset_problems(config: "Config", manifest: dict[str, Any]) -> Iterator[str]:
    """Yield problems of the dataset: violations of the protocol, and settings that the dataset does not support."""
    rule = manifest["split"]["rule"]
    yield from (f"data.{problem}" for problem in delay_problems(config.data.feedback_delay, manifest))
    negatives = manifest["counts"]["exposures"] - manifest["counts"]["positives"]
    if config.data.drawn_negatives.count and negatives:
        yield (
            f"data.drawn_negatives.count: {config.data.drawn_negatives.count}: the dataset has {negatives:,} negative "
            "exposures of its own, from which the model learns the probability of a click; with drawn negatives it "
            "would learn that of a choice from the catalogue; write 0"
        )
    if config.evaluation.protocol is not None and rule != SPLIT_RULE:
        yield (
            f"data.dataset: {config.data.dataset}: split by {rule!r}; evaluation.protocol "
            f"{config.evaluation.protocol} needs one prepared with --split {SPLIT_RULE}"
        )
