"""`BatchSpec`: the contents of a batch, set by the configuration and checked against the dataset."""

from dataclasses import dataclass
from typing import Literal

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.event_schema import CONTEXT
from hllm_torchrec.data.numeric_features import numeric_problems
from hllm_torchrec.data.request_context import bias_problems, context_problems
from hllm_torchrec.modules.features.hybrid import ACTION_GATE
from hllm_torchrec.modules.fusion import Fusion


@dataclass(frozen=True)
class BatchSpec:
    """Contents of a batch.

    history: "all" earlier events, or only the "positive" ones (label 1);
    visibility: an exposure sees earlier "second"s (ranking) or "position"s (leave-one-out retrieval);
    feedback_delay: seconds from an event until it may be seen; only with visibility by second;
    negatives: number of items sampled per step (0: no negatives and no generative targets);
    item_slots: adds a slot for every unique item in training, for a generative loss over item features;
    positive_targets_only: an item with label 0 is not a generative target;
    item_id, action, action_gate, time_depth, item_features, user_features: the bags of the batch;
    numeric_features: names of features in `hllm_torchrec.data.numeric_features`;
    id_dropout: probability that an item ID is replaced by the unknown ID in training;
    cold_dropout: if above 0, items without a training event have the ID and the vector of the unknown item; in
    training, each item of a step has this ID and vector with this probability;
    interleaved: an event is two tokens of the history, its item and then its action;
    context: declared context of the request, an input of queries; bias: categorical context of the position bias, which
    is added to the logit;
    tasks: labels to predict; empty: the first label of the dataset;
    negative_rate: in training, probability with which an exposure whose first label is 0 is kept.
    """

    fusion: Fusion
    history: Literal["all", "positive"] = "all"
    visibility: Literal["second", "position"] = "second"
    feedback_delay: int = 0
    negatives: int = 0
    item_slots: bool = False
    positive_targets_only: bool = True
    item_id: bool = True
    action: bool = True
    action_gate: bool = False
    time_depth: int = 6
    item_features: tuple[str, ...] = ()
    user_features: tuple[str, ...] = ()
    numeric_features: tuple[str, ...] = ()
    id_dropout: float = 0.0
    interleaved: bool = False
    cold_dropout: float = 0.0
    context: tuple[str, ...] = ()
    bias: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    negative_rate: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "fusion", Fusion(self.fusion))  # callers may pass the name; the dataclass is frozen

    def tables(self, dataset: Dataset) -> dict[str, int]:
        """Key of the batch -> rows of its embedding table, for all tables except those of the time features."""
        sizes = dataset.manifest
        tables = {"item_id": dataset.num_items} if self.item_id else {}
        if self.action:
            tables["action"] = sizes["actions"]["number"]
        if self.action_gate:
            tables[ACTION_GATE] = sizes["actions"]["number"]
        tables |= {CONTEXT + name: dataset.schema.sizes[name] for name in self.context if name in dataset.schema.sizes}
        tables |= {name: sizes["item_features"][name]["size"] for name in self.item_features}
        return tables | {name: sizes["user_features"][name]["size"] for name in self.user_features}


def check_batch_spec(spec: BatchSpec, dataset: Dataset) -> list[str]:
    """Problems of a batch spec with this dataset, one line for each."""
    problems = []
    for kind, names in (("item", spec.item_features), ("user", spec.user_features)):
        known = dataset.manifest[f"{kind}_features"]
        problems += [
            f"data.{kind}_features: {n!r}: not in the dataset; it has {sorted(known)}" for n in names if n not in known
        ]
    problems += context_problems("data.context", spec.context, dataset.schema)
    problems += bias_problems("objective.position_bias", spec.bias, dataset.schema)
    return problems + numeric_problems(spec.numeric_features)
