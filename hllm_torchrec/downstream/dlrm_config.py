"""Settings of the DLRM and of `hllm downstream`, without imports of training code, so that `--help` is fast."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.bounds import out_of_bounds
from hllm_torchrec.config.objective import TaskConfig, task_entry_problems

VectorPlacement = Literal["dense", "slots"]
"""Position of stored vectors in a DLRM: dense features, or slots of the interaction."""


@dataclass(frozen=True)
class DLRMConfig:
    """ID-only DLRM: inputs, size and training."""

    seed: int = 0
    """Random seed of weights, shuffling and dropout."""
    width: int = 16
    """Width of all tables, and of the last layer of the bottom network."""
    bottom: tuple[int, ...] = (64,)
    """Widths of the hidden layers of the bottom network, whose inputs are the numeric features and numeric context."""
    top: tuple[int, ...] = (64, 32)
    """Widths of the hidden layers of the top network, whose inputs are the interactions; at least one layer."""
    init_scale: float = 0.02
    """Table entries are initialized uniformly in +-init_scale."""
    max_bag: int = 100
    """Maximum number of items per bag (liked items, disliked items); the latest items are used."""
    share_items: bool = True
    """Use the target item's table for the bags, so that the interaction of target and bag measures item similarity."""
    user_id: bool = True
    """Add a table of users."""
    user_features: tuple[str, ...] = ()
    """Categorical user features of the dataset."""
    numeric_features: tuple[str, ...] = ("history_length", "user_mean", "log_gap")
    """Names of `hllm_torchrec.data.numeric_features`; at least one."""
    feedback_delay: int = 0
    """Seconds from an event until it may be seen, like `data.feedback_delay` of the model whose vectors are used."""
    time: bool = True
    """Add the hour and the day of the week (UTC), if the dataset has timestamps."""
    context: tuple[str, ...] = ()
    """Declared context of the request, like `data.context` of a model."""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Labels to predict, as `objective.tasks` of a model. Empty: only the first label."""
    towers: Literal["shared_bottom", "mmoe"] = "shared_bottom"
    """shared_bottom: the tasks are the outputs of one top network. mmoe: for each task, a gate mixes the outputs of
    `experts` top networks, and a tower of the task reads the mixture."""
    experts: int = 4
    """Number of experts of `towers: mmoe`."""
    position_bias: tuple[str, ...] = ()
    """Categorical context with a learned bias of the logits of binary tasks, as `objective.position_bias` of a model.
    In evaluation, a constant replaces the bias."""
    negative_rate: float = 1.0
    """Share of the negatives that each epoch trains on, like `data.negative_rate` of a model: with the same seed, the
    draws are the same, and the logit is corrected in the same way."""
    item_dropout: float = 0.1
    """Probability, in training, that the target item is replaced by the unknown item."""
    user_dropout: float = 0.9
    """Probability, in training, that the user is replaced by the unknown user; high, because most scored users do not
    occur in training."""
    epochs: int = 12
    """Maximum number of passes over the training exposures."""
    patience: int = 3
    """Stop after this many epochs without a better validation AUC; the best epoch's weights are used."""
    batch: int = 1024
    """Number of exposures per step, over all ranks."""
    lr: float = 1e-3
    """Learning rate of AdamW, which trains the networks and the tables that are not sharded."""
    table_lr: float = 0.02
    """Learning rate of row-wise Adagrad, which trains the sharded tables."""
    weight_decay: float = 0.01
    """Weight decay of the weight matrices of the networks."""
    clip_norm: float = 1.0
    """Maximum gradient norm of the parameters that AdamW trains; 0: no clipping."""
    shard_from_rows: int = 1024
    """Tables with fewer rows are replicated and trained by AdamW."""

    @property
    def task_configs(self) -> dict[str, TaskConfig]:
        """`tasks` as dataclasses; `dlrm_problems` has checked their contents."""
        return {name: TaskConfig(**content) for name, content in self.tasks.items()}


DLRM_BOUNDS = {
    "dlrm.seed": ">= 0",
    "dlrm.width": ">= 1",
    "dlrm.init_scale": ">= 0",
    "dlrm.max_bag": ">= 1",
    "dlrm.feedback_delay": ">= 0",
    "dlrm.negative_rate": "> 0, <= 1",
    "dlrm.experts": ">= 2",
    "dlrm.item_dropout": ">= 0, < 1",
    "dlrm.user_dropout": ">= 0, < 1",
    "dlrm.epochs": ">= 1",
    "dlrm.patience": ">= 1",
    "dlrm.batch": ">= 1",
    "dlrm.lr": ">= 0",
    "dlrm.table_lr": ">= 0",
    "dlrm.weight_decay": ">= 0",
    "dlrm.clip_norm": ">= 0",
    "dlrm.shard_from_rows": ">= 1",
}
"""Dotted field of a `dlrm` section -> its range."""


def dlrm_problems(config: DLRMConfig) -> Iterator[str]:
    """Broken rules of tasks and context in a `dlrm` section, one line each."""
    yield from task_entry_problems(config.tasks, "dlrm.tasks")
    if both := sorted(set(config.position_bias) & set(config.context)):
        yield f"dlrm.position_bias: {both[0]!r} is in dlrm.context too, where serving would need it; leave one out"


IDS_ONLY, ITEMS, USERS, BOTH = "alone", "items", "users_", "both_"
"""Names of rows; USERS and BOTH are prefixes, followed by a store's name."""


@dataclass(frozen=True)
class DownstreamConfig:
    """A DLRM and the stores that it can use.

    Raises:
        ConfigError: values are out of range, the stores do not allow a row, or two stores have one name; lists all
            problems.
    """

    output: str = "runs/stages/3"
    """Output directory, with a folder of checkpoints and predictions for each row."""
    dataset: str = "data/ml-100k"
    """Directory written by `hllm prepare`."""
    item_store: str | None = None
    """Store of item vectors by raw id, from `hllm embed --items` or `hllm exposures --items`."""
    user_stores: tuple[str, ...] = ()
    """Stores of `hllm exposures --users`; rows are named by the store's folder."""
    rows: tuple[str, ...] = ()
    """Rows to train; empty: all rows that the stores allow."""
    way: VectorPlacement = "slots"
    """Position of stored vectors in the DLRM: slots of the interaction, or dense features."""
    vector_dropout: float = 0.0
    """Dropout probability of the vectors' entries; without it a user's vector can identify the training user."""
    dlrm: DLRMConfig = field(default_factory=DLRMConfig)
    """DLRM of every row."""

    def __post_init__(self) -> None:
        problems = list(out_of_bounds(self, DLRM_BOUNDS | {"vector_dropout": ">= 0, < 1"}))
        problems += dlrm_problems(self.dlrm)
        possible = self.possible_rows()
        for row in self.rows:
            if row not in possible:
                problems.append(f"rows: {row!r}: not possible with these stores; there are {', '.join(possible)}")
        if len({Path(store).name for store in self.user_stores}) < len(self.user_stores):
            problems.append(
                f"user_stores: {list(self.user_stores)}: two folders of one name; rows are named by them: rename one"
            )
        if problems:
            raise ConfigError(problems)

    def possible_rows(self) -> dict[str, tuple[str | None, str | None]]:
        """Row -> (item store, user store), None if the row does not use one."""
        found: dict[str, tuple[str | None, str | None]] = {IDS_ONLY: (None, None)}
        if self.item_store is not None:
            found[ITEMS] = (self.item_store, None)
        for store in self.user_stores:
            found[f"{USERS}{Path(store).name}"] = (None, store)
            if self.item_store is not None:
                found[f"{BOTH}{Path(store).name}"] = (self.item_store, store)
        return found
