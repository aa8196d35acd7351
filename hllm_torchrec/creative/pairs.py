"""Pairs of an item and a cluster of users that get a title: those whose match is predicted to be best.

The match of a pair is the probability that the center of the cluster likes the item, by the late-fusion head of the run
("head"), or by its Item-User Predictor ("predictor"). The head is trained where exposures are, so in the run from which
a creator run started: if that run's user encoder was trained further, on texts, its head scores other vectors than it
has learned from.

Legend: n items, K clusters, D width of users' vectors.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from hllm_torchrec.common.arrays import Floats, Ints
from hllm_torchrec.data.collate import Collator
from hllm_torchrec.evaluation.catalogue_retrieval import vectors_by_features
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.modules.heads import PredictionHead

Match = Literal["head", "predictor", "none"]


@dataclass(frozen=True)
class PairRule:
    """match: what scores a pair; top: best clusters of an item that are kept (0: all); above: least match."""

    match: Match = "head"
    top: int = 0
    above: float = 0.0

    def check(self, experiment: Experiment) -> None:
        """Raise ValueError if a model cannot score pairs so, or the rule does nothing."""
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

    def kept(self, scores: Floats) -> np.ndarray:
        """Mask [n, K] of the pairs with matches [n, K] that are kept; of equal ones the first clusters."""
        keep = scores >= self.above
        if self.top:
            place = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1, kind="stable")
            keep &= place < self.top
        return keep


@torch.no_grad()
def match_scores(experiment: Experiment, match: Match, centers: Floats, items: Ints) -> Floats:
    """Match [n, K] of items by their dense ids [n] with centers [K, D]; NaN without a score. Collective."""
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
        collator = Collator(
            experiment.dataset, experiment.batch_spec, item_vectors=experiment.item_vectors, context=experiment.context
        )
        targets = vectors_by_features(experiment, collator, items)
        rows = [hllm.head(users, one.expand(len(users), -1)) for one in targets]
        logits = hllm.biased(torch.cat(rows)).view(items.size, -1)
    # Rounded, so that the pairs that are kept do not depend on the number of ranks that encoded the items.
    found: Floats = logits.sigmoid().float().cpu().numpy().round(5)
    return found
