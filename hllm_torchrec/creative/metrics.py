"""Summary of the likelihoods of personalized texts, with confidence intervals over users."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hllm_torchrec.creative.clusters import Clusters
from hllm_torchrec.evaluation.creative_scores import CreativeScores, CreativeVectors
from hllm_torchrec.metrics.bootstrap import user_mean_interval, user_ratio_interval

CLUSTER = "cluster_"
"""Prefix of the names of conditions in which the user vector is replaced by the center of the user's cluster."""


def centers_of(vectors: CreativeVectors, clusters: Sequence[Clusters], weights: str) -> dict[str, Tensor]:
    """Assign the user vector of each creative to a cluster, and return the centers as conditions of an evaluation.

    Args:
        vectors: user vectors [N, D] of the creatives, see `creative_vectors`.
        clusters: clusters to evaluate.
        weights: fingerprint of the model that computed the vectors.

    Returns:
        Name of the condition -> centers [N, D].

    Raises:
        ValueError: the clusters belong to another model, or two of them have the same number of clusters.
    """
    found: dict[str, Tensor] = {}
    for one in clusters:
        if one.facts["source"].get("weights") != weights:
            raise ValueError(
                f"--clusters {one.path}: its users were embedded by another checkpoint: embed them with this one "
                "(hllm embed --users), and cluster them (hllm cluster)"
            )
        if (name := f"{CLUSTER}{len(one)}") in found:
            raise ValueError(f"--clusters {one.path}: another folder has {len(one)} clusters as well: give only one")
        place = one.centers.assign(vectors.vectors.numpy())[0]
        found[name] = torch.from_numpy(one.centers.centers)[torch.from_numpy(place)]
    return found


def summarize(scores: CreativeScores) -> dict[str, Any]:
    """Average the negative log-likelihoods of each condition, and compare each condition with the right user.

    Returns:
        nll, nll_per_token: means of each condition in nats per creative and per token; differences: mean of each
        condition minus right, paired by creative, with a 95% interval by resampling users. null - right is the main
        result; shuffled - right overstates it, because it also includes the cost of confident wrong predictions. kept:
        for each number of clusters (null - cluster) / (null - right), the share of the gain that remains if the center
        of the user's cluster replaces the user vector. It is unreliable if null - right is near 0.
    """
    right, tokens = scores.nll["right"], max(1, int(scores.tokens.sum()))
    found: dict[str, Any] = {
        "creatives": int(right.size),
        "users": len(set(scores.user_ids.tolist())),
        "tokens": tokens,
        "nll": {name: float(values.mean()) for name, values in scores.nll.items()},
        "nll_per_token": {name: float(values.sum() / tokens) for name, values in scores.nll.items()},
        "differences": {},
        "kept": {},
    }
    for name, values in scores.nll.items():
        if name != "right":
            low, high = user_mean_interval(values - right, scores.user_ids)
            found["differences"][f"{name} - right"] = {"mean": float((values - right).mean()), "interval": [low, high]}
        if name.startswith(CLUSTER):
            won, all_of_it = scores.nll["null"] - values, scores.nll["null"] - right
            low, high = user_ratio_interval(won, all_of_it, scores.user_ids)
            share = float(won.sum() / all_of_it.sum()) if all_of_it.sum() else float("nan")
            found["kept"][name] = {"share": share, "interval": [low, high]}
    return found


def described(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that `hllm creatives evaluate` prints for the optional measurements in `found`."""
    for name, one in found["kept"].items():
        low, high = one["interval"]
        yield f"  kept by {name:<12} {one['share']:8.1%}  95% over users [{low:.1%}, {high:.1%}]"
    if "users_among" in found:
        one = found["users_among"]
        yield (
            f"rank of the right user among {one['candidates']}, over {one['creatives']} texts: recall@1 "
            f"{one['recall_1']:.3f}, "
            f"MRR {one['mrr']:.3f}, mean rank {one['mean_rank']:.1f} (chance {one['expected_rank']:.1f})"
        )
    if "written" in found:
        written = found["written"]
        yield f"{written['texts']} texts written, against their references (support by the item's texts)"
        for name, one in written["conditions"].items():
            yield (
                f"  {name:<12} ROUGE-1 {one['rouge_1']:.3f}, ROUGE-L {one['rouge_l']:.3f}, support "
                f"{one['support']:.3f}, {one['equal_to_null']:.1%} equal to null"
            )
        yield f"  {written['cost']['titles_per_second']:.1f} titles/s"
    if "titles" in found:
        one = found["titles"]
        yield (
            f"{one['titles']:,} titles: {one['fallbacks']:.1%} the item's own, distinct-1 {one['distinct_1']:.3f}, "
            f"distinct-2 {one['distinct_2']:.3f}, {one['most_frequent']:.1%} equal to the item's most frequent title, "
            f"{one['equal_to_null']:.1%} equal to null"
        )
