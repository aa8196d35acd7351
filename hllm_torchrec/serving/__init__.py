"""Scoring of candidates against cached histories, recommendations, and the service."""

from hllm_torchrec.serving.scorer import Scorer as Scorer
from hllm_torchrec.serving.scorer import UserHistory as UserHistory
