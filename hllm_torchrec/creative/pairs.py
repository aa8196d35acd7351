"""Selection of the clusters of users for which an item gets a title, by predicted probabilities.

The match of an item and a cluster is the probability that a user whose vector is the cluster's center likes the item.
It is predicted by the run's late-fusion head ("head") or by its Item-User Predictor ("predictor"). A run that trains on
texts does not train the head. If such a run trains the user encoder, the head reads other user vectors than in its own
training.

Legend: n items, K clusters, D width of users' vectors.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from hllm_torchrec.common.arrays import Floats, Ints
from hllm_torchrec.evaluation.catalogue_retrieval import vectors_by_features
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.modules.heads import PredictionHead

Match = Literal["head", "predictor", "none"]


@dataclass(frozen=True)
class PairRule:
    """Rule of the selection.

    match: what predicts the match, "none": all clusters are selected; top: number of clusters with the largest matches
    that are selected for an item (0: all); above: minimum match.
    """

    match: Match = "head"
    top: int = 0
    above: float = 0.0

    def check(self, experiment: Experiment) -> None:
        """Check that a model can predict the match, and that the rule is consistent.

        Raises:
            ValueError: the model cannot predict the match, or top or above is given with match "none".
        """
        hllm, evidence = experiment.hllm, experiment.evidence is not None
        if self.match == "none" and (self.top or self.above):
            raise ValueError("--match none scores no pairs: --top and --above need --match head or predictor")
        if self.match == "head" and (not hllm.fusion.query_is_user or evidence):
            reason = "its head reads evidence of each user" if evidence else "it has no late-fusion head"
            raise ValueError(f"--match head: {reason}; write --match none, or predictor if the run has one")
        if self.match == "predictor" and (hllm.creative_head is None or hllm.creative_head.match is None):
            raise ValueError(
                "--match predictor: the run was trained without it (creative.losses.match); write --match head or none"
            )

    def selected(self, match: Floats) -> Ints:
        """Return the clusters selected for an item with matches [K], ascending; of equal matches the first ones win."""
        if self.match == "none":
            return np.arange(match.size)
        best = np.argsort(-match, kind="stable")[: self.top or None]
        return np.sort(best[match[best] >= self.above])


@torch.no_grad()
def match_scores(experiment: Experiment, match: Match, centers: Floats, items: Ints) -> Floats:
    """Predict the match [n, K] of items (dense ids [n]) and centers [K, D]; NaN for "none". Collective."""
    if match == "none":
        return np.full((items.size, len(centers)), np.nan, np.float32)
    hllm, device = experiment.hllm, experiment.device
    users = torch.from_numpy(centers).to(device)
    if match == "predictor":
        assert hllm.creative_head is not None and hllm.creative_head.match is not None
        embedded = hllm.embed_items(torch.from_numpy(items).to(device)).float()
        logits = hllm.creative_head.match.score_all(users, embedded).T
    else:
        assert isinstance(hllm.head, PredictionHead)
        targets = vectors_by_features(experiment, experiment.request_collator(), items)
        users = users[:, : hllm.user.width]  # the head does not read the mean text of `creative.soft.text_decay`
        rows = [hllm.head(users, one.expand(len(users), -1)) for one in targets]
        logits = hllm.biased(torch.cat(rows)).view(items.size, -1)
    # Rounded, so that the selection does not depend on the number of ranks among which the items were encoded.
    found: Floats = logits.sigmoid().float().cpu().numpy().round(5)
    return found
