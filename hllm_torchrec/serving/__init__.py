"""Scoring of candidates against a cached history, and recommendations from it."""

from hllm_torchrec.serving.scorer import Scorer as Scorer
from hllm_torchrec.serving.scorer import UserHistory as UserHistory
