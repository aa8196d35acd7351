"""Metrics within users: see `metric.UserMetric`."""

from hllm_torchrec.metrics.metric import UserMetric

GAUC = UserMetric(
    "gauc",
    "GAUC",
    "AUC within a user, users weighted by their exposures",
    ratio=lambda within: (float(within.aucs @ within.weights), float(within.weights.sum())),
)
GAUC_USER_WEIGHTED = UserMetric(
    "gauc_user_weighted",
    "GAUC by user",
    "AUC within a user, all users with equal weight",
    ratio=lambda within: (float(within.aucs.sum()), float(len(within.aucs))),
)
