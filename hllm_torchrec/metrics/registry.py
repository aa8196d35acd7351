"""All metrics of a binary label in `hllm evaluate` except AUC and its intervals, in the order of `metrics.json`.

To add a metric, define a `RankMetric`, a `ProbabilityMetric` or a `UserMetric` and add it here: the job computes it,
and it appears in metrics.json, the report, TensorBoard and the tracker.
"""

from hllm_torchrec.metrics.metric import Metric, ProbabilityMetric, RankMetric, UserMetric
from hllm_torchrec.metrics.probabilities import BRIER, CALIBRATION, ECE, LOG_LOSS, NORMALIZED_ENTROPY
from hllm_torchrec.metrics.rank_metrics import PR_AUC, RECALL_AT_PRECISION
from hllm_torchrec.metrics.user_metrics import GAUC, GAUC_USER_WEIGHTED

METRICS: tuple[Metric, ...] = (
    PR_AUC,
    GAUC,
    GAUC_USER_WEIGHTED,
    LOG_LOSS,
    NORMALIZED_ENTROPY,
    BRIER,
    CALIBRATION,
    ECE,
    RECALL_AT_PRECISION,
)

RANK_METRICS = [metric for metric in METRICS if isinstance(metric, RankMetric)]
PROBABILITY_METRICS = [metric for metric in METRICS if isinstance(metric, ProbabilityMetric)]
USER_METRICS = [metric for metric in METRICS if isinstance(metric, UserMetric)]
