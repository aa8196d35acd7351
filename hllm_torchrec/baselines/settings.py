"""Settings of the baselines; the defaults of `hllm baselines` are in `configs/baselines/*.yaml`."""

from dataclasses import dataclass, field

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.bounds import out_of_bounds
from hllm_torchrec.data.item_factors import FactorOptions
from hllm_torchrec.downstream.dlrm_config import DLRM_BOUNDS, DLRMConfig, dlrm_problems


@dataclass(frozen=True)
class ItemMeanConfig:
    """Mean training label of the item."""

    shrinkage: float = 5.0
    """Pseudo-count: number of labels equal to the overall mean that are added to each item's labels."""


@dataclass(frozen=True)
class RunningBiasConfig:
    """Item bias and the user's running residual mean."""

    item_shrinkage: float = 5.0
    """Pseudo-count: number of labels equal to the overall mean that are added to each item's labels."""
    user_shrinkage: float = 5.0
    """Pseudo-count: number of zero residuals added to each user's residuals."""


BASELINE_BOUNDS = {
    "feedback_delay": ">= 0",
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
"""Dotted field -> its range."""


@dataclass(frozen=True)
class BaselinesConfig:
    """Settings of all baselines of `hllm baselines`.

    Raises:
        ConfigError: values are out of range; the message lists all of them.
    """

    feedback_delay: int = 0
    """Seconds from an event until a baseline may see it, like a model's `data.feedback_delay`. Replaces
    `dlrm.feedback_delay`."""
    item_mean: ItemMeanConfig = field(default_factory=ItemMeanConfig)
    """Mean training label of the item."""
    running_bias: RunningBiasConfig = field(default_factory=RunningBiasConfig)
    """Item bias and the user's running residual mean."""
    gaussian: FactorOptions = field(default_factory=FactorOptions)
    """Linear-Gaussian factors."""
    dlrm: DLRMConfig = field(default_factory=DLRMConfig)
    """ID-only DLRM."""

    def __post_init__(self) -> None:
        problems = list(out_of_bounds(self, BASELINE_BOUNDS))
        problems += dlrm_problems(self.dlrm)
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
"""Baselines of `hllm retrieval`."""


@dataclass(frozen=True)
class RetrievalBaselinesConfig:
    """Hyperparameter grids and evaluation settings of the retrieval baselines."""

    ease_l2: tuple[float, ...] = (50.0, 100.0, 200.0, 400.0, 800.0)
    """L2 regularization of EASE."""
    markov_decay: tuple[float, ...] = (0.0, 0.6, 0.8, 0.9)
    """Decay of the weight of a history event per step into the past; 0: only the last event."""
    markov_gap_decay: tuple[float, ...] = (0.0, 0.5, 0.8, 0.9)
    """Decay of the weight of a follower per step; 0: only the next event."""
    markov_damping: tuple[float, ...] = (0.0, 0.25)
    """A follower's counts are divided by its number of training events to the power of this exponent."""
    markov_shrinkage: float = 10.0
    """Pseudo-count added to an item's number of events; reduces the influence of rare items."""
    window: int = 20
    """Number of history events, and of steps to a follower, used by the chain."""
    ks: tuple[int, ...] = (10, 50, 200)
    """K of Recall@K and NDCG@K."""
    filter_seen: bool = True
    """Exclude the items of the visible history from the candidates."""
    positive_only: bool = False
    """Exclude exposures with label 0 from the targets."""
