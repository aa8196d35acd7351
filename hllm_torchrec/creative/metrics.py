"""Summary of likelihoods of personalized texts, with intervals over users."""

from typing import Any

from hllm_torchrec.evaluation.creative_scores import CreativeScores
from hllm_torchrec.metrics.bootstrap import user_mean_interval


def summarize(scores: CreativeScores, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Nats per creative and per token of each condition, and what the right user is worth against each other one.

    Differences are paired, with 95% intervals by resampling users. `gap` = null - right is the headline;
    shuffled - right overstates it, because it also includes the cost of being confidently wrong.
    """
    right, tokens = scores.nll["right"], max(1, int(scores.tokens.sum()))
    found: dict[str, Any] = {
        "creatives": int(right.size),
        "users": len(set(scores.user_ids.tolist())),
        "tokens": tokens,
        "nll": {name: float(values.mean()) for name, values in scores.nll.items()},
        "nll_per_token": {name: float(values.sum() / tokens) for name, values in scores.nll.items()},
        "differences": {},
    }
    for name, values in scores.nll.items():
        if name != "right":
            low, high = user_mean_interval(values - right, scores.user_ids, draws, seed)
            found["differences"][f"{name} - right"] = {"mean": float((values - right).mean()), "interval": [low, high]}
    return found
