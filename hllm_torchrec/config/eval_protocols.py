"""Published protocols of retrieval: what each asks of a configuration, checked before anything is trained.

leave_one_out   HLLM's paper, section 4.1, and SASRec's before it: of every user the last event is the test
                target and the last but one the validation target; the model trains on the rest and is chosen on
                validation; all other items are candidates.
ml1m_hstu       Meta's README for MovieLens-1M: trained on everything but the last event for a fixed number of
                epochs, tested on the last event. Nothing may be chosen by the validation targets, which were
                trained on: choose with `leave_one_out`, then train once more and test once.

In both every event is a target whatever its rating, the whole catalogue is ranked, and a user's history is the
only thing left out of it (`evaluation.filter_seen`, on in both publications).
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
"""Protocol -> dotted field -> what it must be."""

SPLIT_RULE = "leave_one_out"
"""How the dataset of every protocol is split."""


def protocol_problems(config: "Config") -> Iterator[str]:
    """What of a configuration its protocol forbids, and a choice made on targets that were trained on."""
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


def dataset_problems(config: "Config", manifest: dict[str, Any]) -> Iterator[str]:
    """What of a dataset the configuration's protocol forbids."""
    rule = manifest["split"]["rule"]
    if config.evaluation.protocol is not None and rule != SPLIT_RULE:
        yield (
            f"data.dataset: {config.data.dataset}: split by {rule!r}; evaluation.protocol "
            f"{config.evaluation.protocol} needs one prepared with --split {SPLIT_RULE}"
        )
