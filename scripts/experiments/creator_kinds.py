"""Share of the right user's gain in nats on E1's texts that remains if only the user's cluster is known.

    python scripts/experiments/creator_kinds.py --dataset data/ml-100k --clusters 8 64 256 1024

E1's texts name the genre of the film with the largest lift in the user's latest 20 likes. No language model is involved
here: the training texts are clustered by k-means of the shares of genres in these 20 likes, and the genre is chosen by
a linear layer (`creator_probe.py`). The script prints the nats of the part's texts if the layer gets nothing about the
user, the user's own shares (right), or the mean shares of the user's cluster (with a separately fitted layer); and

    kept(K) = (nothing - cluster) / (nothing - right)

The table of texts is that of `creator_e1.py`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from creator_probe import Texts, linear_choice
from jobs import ROOT
from sklearn.cluster import KMeans

from hllm_torchrec.data.dataset import Dataset

WINDOW = "20 likes"


def kept(train: Texts, held_out: Texts, clusters: Sequence[int]) -> dict[str, float]:
    """Compute the nats of each condition, and kept(K) for each K in `clusters`; held_out: the texts that are scored."""
    own, others = train.counts[WINDOW], held_out.counts[WINDOW]
    nothing = linear_choice(torch.zeros(len(own), 1), train)(torch.zeros(len(others), 1))
    found = {"nothing": held_out.scores(nothing)[0], "right": held_out.scores(linear_choice(own, train)(others))[0]}
    for number in clusters:
        fitted = KMeans(number, n_init=1, random_state=0).fit(own.numpy())
        centers = torch.from_numpy(fitted.cluster_centers_)
        choice = linear_choice(centers[fitted.labels_.astype(np.int64)], train)
        nats = held_out.scores(choice(centers[fitted.predict(others.numpy()).astype(np.int64)]))[0]
        found[f"cluster {number}"] = nats
        found[f"kept {number}"] = (found["nothing"] - nats) / (found["nothing"] - found["right"])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=ROOT / "data" / "ml-100k", help="prepared MovieLens-100k")
    parser.add_argument("--split", choices=("valid", "test"), default="valid", help="part whose texts are scored")
    parser.add_argument("--clusters", nargs="+", type=int, default=[8, 64, 256, 1024], help="numbers of clusters")
    arguments = parser.parse_args(argv)
    dataset = Dataset.open(arguments.dataset)
    found = kept(Texts(dataset, "train"), Texts(dataset, arguments.split), arguments.clusters)
    print(json.dumps({"split": arguments.split, **found}, indent=1))


if __name__ == "__main__":
    main()
