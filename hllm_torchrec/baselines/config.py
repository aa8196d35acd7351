"""Settings of the baselines; `configs/baselines/*.yaml` holds those that `hllm baselines` starts from."""

from dataclasses import dataclass, field
from typing import Literal

from hllm_torchrec.config_rules import out_of_bounds
from hllm_torchrec.data.factors import FactorOptions
from hllm_torchrec.errors import ConfigError

Way = Literal["dense", "slots"]
"""How vectors from elsewhere enter a DLRM: among its dense features, or as slots of the interaction."""


@dataclass(frozen=True)
class ItemMeanConfig:
    """The item's mean training label."""

    shrinkage: float = 5.0
    """Labels of the overall mean that are added to each item's own."""


@dataclass(frozen=True)
class RunningBiasConfig:
    """Item bias and the user's running residual mean."""

    item_shrinkage: float = 5.0
    """Labels of the overall mean that are added to each item's own."""
    user_shrinkage: float = 5.0
    """Residuals of 0 that are added to each user's own."""


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
    """Of `hllm_torchrec.data.numeric`; at least one."""
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

BOUNDS = {
    "item_mean.shrinkage": ">= 0",
    "running_bias.item_shrinkage": ">= 0",
    "running_bias.user_shrinkage": ">= 0",
    "gaussian.factors": ">= 1",
    "gaussian.prior": "> 0",
    "gaussian.noise": "> 0",
    "gaussian.iterations": ">= 1",
    "gaussian.max_users": ">= 1",
    **DLRM_BOUNDS,
}
"""Dotted field -> what its value must be."""


@dataclass(frozen=True)
class BaselinesConfig:
    """All baselines.

    Raises:
        ConfigError: values out of range, all of them.
    """

    item_mean: ItemMeanConfig = field(default_factory=ItemMeanConfig)
    """The item's mean training label."""
    running_bias: RunningBiasConfig = field(default_factory=RunningBiasConfig)
    """Item bias and the user's running residual mean."""
    gaussian: FactorOptions = field(default_factory=FactorOptions)
    """Linear-Gaussian factors."""
    dlrm: DLRMConfig = field(default_factory=DLRMConfig)
    """The ID-only DLRM."""

    def __post_init__(self) -> None:
        problems = list(out_of_bounds(self, BOUNDS))
        for name in ("bottom", "top"):
            sizes = getattr(self.dlrm, name)
            if min(sizes, default=1) < 1:
                problems.append(f"dlrm.{name}: {list(sizes)}: every layer must be at least 1 wide")
        for name in ("top", "numeric_features"):
            if not getattr(self.dlrm, name):
                problems.append(f"dlrm.{name}: empty: torchrec's DLRM needs at least one")
        if problems:
            raise ConfigError(problems)


RETRIEVAL_NAMES = ("popularity", "ease", "markov")
"""The baselines of `hllm retrieval`."""


@dataclass(frozen=True)
class RetrievalBaselinesConfig:
    """Grids that settings are chosen from, and what is measured."""

    ease_l2: tuple[float, ...] = (50.0, 100.0, 200.0, 400.0, 800.0)
    """Ridge of EASE."""
    markov_decay: tuple[float, ...] = (0.0, 0.6, 0.8, 0.9)
    """Weight of an event of the history against the one after it; 0: the last event alone."""
    markov_gap_decay: tuple[float, ...] = (0.0, 0.5, 0.8, 0.9)
    """Weight of a follower against one that is a step nearer; 0: the next event alone."""
    markov_damping: tuple[float, ...] = (0.0, 0.25)
    """Exponent of the follower's popularity that its counts are divided by."""
    markov_shrinkage: float = 10.0
    """Added to an item's number of events, so that rare items say less."""
    window: int = 20
    """Events of the history, and steps to a follower, that the chain looks at."""
    ks: tuple[int, ...] = (10, 50, 200)
    """K of Recall@K and NDCG@K."""
    filter_seen: bool = True
    """Items of a user's history are no candidates."""
    positive_only: bool = False
    """Exposures with label 0 are no targets."""
