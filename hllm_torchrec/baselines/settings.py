"""Settings of the baselines; `configs/baselines/*.yaml` holds those that `hllm baselines` starts from."""

from dataclasses import dataclass, field

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.bounds import out_of_bounds
from hllm_torchrec.data.item_factors import FactorOptions
from hllm_torchrec.downstream.dlrm_config import DLRM_BOUNDS, DLRMConfig


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


BASELINE_BOUNDS = {
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
        problems = list(out_of_bounds(self, BASELINE_BOUNDS))
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
