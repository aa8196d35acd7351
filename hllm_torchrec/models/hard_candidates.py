"""Candidates for hard negatives: each user's nearest items by the stored embeddings of a retrieval run."""

import numpy as np
import torch
from torch.nn.functional import normalize

from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.jagged_arrays import offsets_from_lengths
from hllm_torchrec.store.keys import raw_keys
from hllm_torchrec.store.store import EmbeddingStore

USERS_AT_ONCE = 1024


def retrieved_candidates(
    dataset: Dataset, items: Ints, item_store: str, user_store: str, top: int
) -> tuple[Ints, Ints]:
    """(candidates, offsets [users + 1]): for each user, the `top` of `items` [n] by cosine with the user's vector.

    Users without a vector have no candidates, and items without a vector are left out.

    Raises:
        ValueError: a store does not exist, or the two have vectors of different widths.
    """
    item_vectors, has_item = _vectors(item_store, dataset, "item")
    user_vectors, has_user = _vectors(user_store, dataset, "user")
    if item_vectors.shape[1] != user_vectors.shape[1]:
        raise ValueError(
            f"data.drawn_negatives: {item_store} has vectors of width {item_vectors.shape[1]}, {user_store} of "
            f"{user_vectors.shape[1]}: give the stores of `hllm embed --items` and `--users` of one run"
        )
    known = torch.from_numpy(items)[has_item[torch.from_numpy(items) - 1]]
    of_items, number = normalize(item_vectors[known - 1], dim=1), min(top, len(known))
    rows = torch.nonzero(has_user).flatten()
    # Row 0 of users is the unknown user.
    lengths, found = np.zeros(dataset.num_users, np.int64), [np.empty(0, np.int64)]
    for some in rows.split(USERS_AT_ONCE):
        near = (user_vectors[some] @ of_items.T).topk(number, dim=1).indices
        found.append(known[near].flatten().numpy())
        lengths[some.numpy() + 1] = number
    return np.concatenate(found), offsets_from_lengths(lengths)


def _vectors(store: str, dataset: Dataset, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(vectors [n, E], bool [n] True if the store has the vector) of all items or users except the unknown one."""
    opened = EmbeddingStore.open(store)
    table = dataset.items if kind == "item" else dataset.users
    vectors, known = opened.snapshot().gather(raw_keys(table[f"raw_{kind}_id"], opened.kind))
    return vectors.float(), known
