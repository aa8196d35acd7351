"""Settings of `hllm downstream`, without what it takes to train: `--help` is then quick."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.bounds import out_of_bounds

VectorPlacement = Literal["dense", "slots"]
"""How vectors from elsewhere enter a DLRM: among its dense features, or as slots of the interaction."""


@dataclass(frozen=True)
class DLRMConfig:
    """The ID-only DLRM: its inputs, its size, its training."""

    seed: int = 0
    """Of weights, shuffling and dropout."""
    width: int = 16
    """Of every table, and of the last layer of the bottom network."""
    bottom: tuple[int, ...] = (64,)
    """Hidden layers of the bottom network, over the numeric features."""
    top: tuple[int, ...] = (64, 32)
    """Hidden layers of the top network, over the interactions; at least one."""
    init_scale: float = 0.02
    """Table entries start uniform in +-init_scale."""
    max_bag: int = 100
    """A bag (items liked, items disliked) holds at most this many of the latest."""
    share_items: bool = True
    """The bags use the target item's table: what the model sees of target and bag is then items' likeness."""
    user_id: bool = True
    """Add a table of users."""
    user_features: tuple[str, ...] = ()
    """Categorical user features of the dataset."""
    numeric_features: tuple[str, ...] = ("history_length", "user_mean", "log_gap")
    """Of `hllm_torchrec.data.numeric_features`; at least one."""
    time: bool = True
    """Add the hour and the day of the week (UTC), where the dataset has timestamps."""
    item_dropout: float = 0.1
    """Probability, in training, that the target item is read as unknown."""
    user_dropout: float = 0.9
    """The same for the user: most users to be scored were never seen in training."""
    epochs: int = 12
    """Passes over the training exposures, at most."""
    patience: int = 3
    """Stop after this many epochs without a better validation AUC; the best epoch's weights are used."""
    batch: int = 1024
    """Exposures per step, over all ranks."""
    lr: float = 1e-3
    """Learning rate of AdamW, for the networks and the tables that are not sharded."""
    table_lr: float = 0.02
    """Of row-wise Adagrad, for the sharded tables."""
    weight_decay: float = 0.01
    """Of the networks' matrices."""
    clip_norm: float = 1.0
    """Gradient norm of what AdamW steps; 0: no clipping."""
    shard_from_rows: int = 1024
    """Tables with fewer rows are replicated and belong to AdamW."""


DLRM_BOUNDS = {
    "dlrm.seed": ">= 0",
    "dlrm.width": ">= 1",
    "dlrm.init_scale": ">= 0",
    "dlrm.max_bag": ">= 1",
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
"""Bounds of a `dlrm` section: dotted field -> what its value must be."""


IDS_ONLY, ITEMS, USERS, BOTH = "alone", "items", "users_", "both_"
"""Rows; the last two are followed by a store's name."""


@dataclass(frozen=True)
class DownstreamConfig:
    """A DLRM and the stores that it may read.

    Raises:
        ConfigError: values out of range or rows without their store, all of them.
    """

    output: str = "runs/stages/3"
    """A folder for each row, with checkpoints and predictions."""
    dataset: str = "data/ml-100k"
    """Directory written by `hllm prepare`."""
    item_store: str | None = None
    """Store of item vectors by raw id, of `hllm embed --items` or `hllm exposures --items`."""
    user_stores: tuple[str, ...] = ()
    """Stores of `hllm exposures --users`; the name of a store's folder names its rows."""
    rows: tuple[str, ...] = ()
    """Which rows; none given: all that the stores allow."""
    way: VectorPlacement = "slots"
    """How vectors enter the DLRM: as slots of the interaction, or among the dense features."""
    vector_dropout: float = 0.0
    """Of the vectors' entries, in training: a user's vector is nearly the user's name."""
    dlrm: DLRMConfig = field(default_factory=DLRMConfig)
    """The DLRM of every row."""

    def __post_init__(self) -> None:
        problems = list(out_of_bounds(self, DLRM_BOUNDS | {"vector_dropout": ">= 0, < 1"}))
        there = self.possible_rows()
        for row in self.rows:
            if row not in there:
                problems.append(f"rows: {row!r}: not possible with these stores; there are {', '.join(there)}")
        if len({Path(store).name for store in self.user_stores}) < len(self.user_stores):
            problems.append(
                f"user_stores: {list(self.user_stores)}: two folders of one name; rows are named by them: rename one"
            )
        if problems:
            raise ConfigError(problems)

    def possible_rows(self) -> dict[str, tuple[str | None, str | None]]:
        """Row -> its stores (items, users)."""
        found: dict[str, tuple[str | None, str | None]] = {IDS_ONLY: (None, None)}
        if self.item_store is not None:
            found[ITEMS] = (self.item_store, None)
        for store in self.user_stores:
            found[f"{USERS}{Path(store).name}"] = (None, store)
            if self.item_store is not None:
                found[f"{BOTH}{Path(store).name}"] = (self.item_store, store)
        return found
