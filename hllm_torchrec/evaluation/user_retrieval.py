"""Retrieval of users by texts: the rank of the right user among others, by the likelihood of a text given each user.

    rank_n = 1 + number of other users m with log p(text_n | user_m, item_n) > log p(text_n | user_n, item_n)

A tie adds one half. The expected rank is (candidates + 1) / 2 if the text does not depend on the user.
"""

from typing import Any

import numpy as np
import torch

from hllm_torchrec.common.arrays import Doubles, Ints
from hllm_torchrec.distributed.collectives import all_gather_variable
from hllm_torchrec.distributed.coordination import rank, world_size
from hllm_torchrec.evaluation.creative_scores import PER_BATCH, CreativeVectors, score_vectors
from hllm_torchrec.models.experiment import Experiment

OTHERS = 99
"""Number of candidates in addition to the right user."""


def user_ranks(
    experiment: Experiment, vectors: CreativeVectors, most: int, others: int = OTHERS
) -> tuple[Doubles, int]:
    """Rank the right users of at most `most` creatives, spread evenly over those that see an event. Collective.

    The vector of another user is that of one of the other user's creatives, drawn at random.

    Returns:
        Ranks [n], and the number of candidates per creative.

    Raises:
        ValueError: the split has fewer than two users with events.
    """
    random, known = np.random.default_rng(0), np.flatnonzero(vectors.known)
    users = np.unique(vectors.user_ids[known])
    if users.size < 2:
        raise ValueError(
            f"retrieval of users needs at least two users with earlier events, and this part has {users.size}: name "
            "another part"
        )
    chosen = known[np.linspace(0, known.size - 1, min(most, known.size)).astype(np.int64)]
    candidates = np.stack([_candidates(vectors, known, one, users, others, random) for one in chosen])
    own = np.arange(chosen.size)[rank() :: world_size()]
    flat = candidates[own].reshape(-1)
    steps = np.split(np.arange(flat.size), range(PER_BATCH, flat.size, PER_BATCH))
    text_of = np.repeat(chosen[own], candidates.shape[1])
    # All ranks take the same number of steps, of which the last may be empty.
    missing = -(-len(range(0, chosen.size, world_size())) * candidates.shape[1] // PER_BATCH) - len(steps)
    nll = score_vectors(
        experiment,
        [*steps, *[np.empty(0, np.int64)] * missing],
        vectors.vectors[torch.from_numpy(flat)],
        torch.zeros(flat.size, dtype=torch.bool),
        lambda index: vectors.loader.tokens.gather(text_of[index]),
    )
    found = torch.cat([torch.empty(0, dtype=torch.float64), *nll]).view(own.size, -1)
    ranks = 1 + (found[:, 1:] < found[:, :1]).sum(1) + 0.5 * (found[:, 1:] == found[:, :1]).sum(1)
    gathered = all_gather_variable(torch.stack([torch.from_numpy(own).double(), ranks.double()], 1))
    ordered: Doubles = gathered[gathered[:, 0].argsort(), 1].cpu().numpy()
    return ordered, candidates.shape[1]


def _candidates(
    vectors: CreativeVectors, known: Ints, creative: int, users: Ints, others: int, random: np.random.Generator
) -> Ints:
    """Return the index of the creative, and the index of a random creative of each of up to `others` other users."""
    of_others = known[vectors.user_ids[known] != vectors.user_ids[creative]]
    drawn = random.permutation(of_others)
    _, first = np.unique(vectors.user_ids[drawn], return_index=True)
    one_of_each = random.permutation(drawn[first])[: min(others, users.size - 1)]
    return np.concatenate([[creative], one_of_each])


def rank_metrics(ranks: Doubles, candidates: int) -> dict[str, Any]:
    """Return recall@1, MRR and mean of ranks [n]; a rank of 1.5 counts half for recall@1."""
    return {
        "creatives": int(ranks.size),
        "candidates": candidates,
        "recall_1": float(np.where(ranks < 2, 2 - ranks, 0).mean()),
        "mrr": float((1 / ranks).mean()),
        "mean_rank": float(ranks.mean()),
        "expected_rank": (candidates + 1) / 2,
    }
