"""Nats per film of EASE on the texts of E2, the next film that a user liked: the reference of a plain recommender.

    python scripts/experiments/creator_ease.py --dataset data/ml-100k

The script reads the table `next` that `creator_e1.py --arms E2` writes. The likes of the training users are fitted in
closed form (arXiv 1905.03375), and a film has the probability softmax(a * score + b * log count) among the films that
the user has not liked yet. The penalty, a and b are chosen on the validation users. Prints JSON with the nats of
popularity, of EASE given the right user, and of EASE given another user, with 95% intervals over users.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from creator_tables import likes
from scipy.linalg import inv
from scipy.optimize import minimize
from scipy.special import log_softmax

from hllm_torchrec.common.arrays import Doubles, Ints
from hllm_torchrec.data.creative_table import CreativeRows, CreativeTable
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.visibility import visible_before
from hllm_torchrec.evaluation.creative_scores import other_users
from hllm_torchrec.metrics.bootstrap import user_mean_interval

PENALTIES = (50.0, 100.0, 200.0, 400.0, 800.0)


def liked_before(dataset: Dataset, part: CreativeRows) -> Doubles:
    """Return [n, items]: 1 for each film that the row's user liked before the row's second, else 0."""
    found, of_user = np.zeros((len(part), dataset.num_items)), {}
    for row, (user, second) in enumerate(zip(part.user_ids.tolist(), part.timestamps.tolist(), strict=True)):
        items, seconds = of_user.setdefault(user, likes(dataset, user))
        found[row, items[: visible_before(seconds, second)]] = 1.0
    return found


def all_likes(dataset: Dataset, users: Ints) -> Doubles:
    """Return [users, items]: 1 for each film that the user liked at any time, else 0."""
    found = np.zeros((users.size, dataset.num_items))
    for row, user in enumerate(users.tolist()):
        found[row, likes(dataset, user)[0]] = 1.0
    return found


def ease_weights(liked: Doubles, penalty: float) -> Doubles:
    """Fit the weights [items, items] of EASE to the binary matrix `liked` [users, items]."""
    inverse = inv(liked.T @ liked + penalty * np.eye(liked.shape[1]))
    weights = -inverse / np.diag(inverse)
    weights[np.diag_indices_from(weights)] = 0.0
    return weights


def nats(logits: Doubles, history: Doubles, films: Ints) -> Doubles:
    """Return [n]: -log of the probability of `films` [n] among the films outside `history` [n, items].

    A film of the history that is nevertheless the right one (another user's history) stays among the candidates.
    """
    rows = np.arange(films.size)
    candidates = np.where(history > 0, -np.inf, logits)
    candidates[:, 0] = -np.inf  # the unknown item
    candidates[rows, films] = logits[rows, films]
    return -log_softmax(candidates, axis=1)[rows, films]


def next_film_nats(table: CreativeTable, split: str, rows: Ints) -> dict[str, Doubles]:
    """Return the nats [n] of the texts `rows` [n] of a part by condition: EASE, and EASE of another user."""
    dataset = table.dataset
    trained_on = all_likes(dataset, np.unique(table.part("train").user_ids))
    valid, part = table.part("valid"), table.part(split)
    known = liked_before(dataset, valid)
    popular = np.log(0.5 + np.bincount(table.part("train").item_ids, minlength=dataset.num_items))
    least, chosen = np.inf, (np.zeros((0, 0)), np.zeros(2))
    for penalty in PENALTIES:
        weights = ease_weights(trained_on, penalty)
        scores = known @ weights
        fit = minimize(
            lambda x, s: nats(x[0] * s + x[1] * popular, known, valid.item_ids).mean(),
            (5.0, 1.0), args=(scores,), method="Nelder-Mead", options={"xatol": 0.01, "fatol": 1e-4},
        )  # fmt: skip
        if fit.fun < least:
            least, chosen = fit.fun, (weights, fit.x)
    weights, (scale, share) = chosen
    history = liked_before(dataset, part)
    found = {"EASE": history, "EASE of another user": history[other_users(part.user_ids)]}
    return {n: nats(scale * (h @ weights) + share * popular, h, part.item_ids)[rows] for n, h in found.items()}


def main() -> None:
    """Print the nats of all texts of the test part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="prepared MovieLens-100k")
    table = CreativeTable.open(Dataset.open(parser.parse_args().dataset), "next")
    users = table.part("test").user_ids
    found = next_film_nats(table, "test", np.arange(users.size))
    counts = 0.5 + np.bincount(table.part("train").item_ids, minlength=table.dataset.num_items)[1:]
    found["popularity"] = -np.log(counts / counts.sum())[table.part("test").item_ids - 1]
    print(json.dumps({n: [float(v.mean()), *user_mean_interval(v, users)] for n, v in found.items()}, indent=1))


if __name__ == "__main__":
    main()
