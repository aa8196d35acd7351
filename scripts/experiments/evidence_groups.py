"""Comparison of the groups of `data.evidence` by a logistic regression on their columns, on several datasets.

    python scripts/experiments/evidence_groups.py --sets data/ml-100k data/ml_small --output runs/evidence

Fits `data.evidence` with each list of groups in VARIANTS, and prints AUC and GAUC of the validation exposures: of all
of them, of random halves of the users and of the items, and of the earlier and the later half. Texts are encoded once
by the encoder of configs/recipes/ranking.yaml into OUTPUT/<set>.npy (`--option item_llm.pretrained=DIR` selects another
encoder). `--part test --only "+ both"` measures the chosen groups on the test part.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from jobs import ROOT, experiment_parser

from hllm_torchrec.common.arrays import Floats
from hllm_torchrec.config.loading import load_config
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.evidence import Evidence
from hllm_torchrec.data.evidence_fit import fit_evidence
from hllm_torchrec.data.item_statistics import ItemStatistics
from hllm_torchrec.data.visibility import visible_before
from hllm_torchrec.distributed.process_group import distributed_device
from hllm_torchrec.launch.recipes import with_recipe
from hllm_torchrec.metrics.auc import roc_auc
from hllm_torchrec.metrics.gauc import gauc
from hllm_torchrec.models.assembly import build_experiment

RECIPE = ROOT / "configs" / "recipes" / "ranking.yaml"
BASE = ("factors", "items", "users", "neighbors")
VARIANTS = {
    "four groups": BASE,
    "+ tastes": (*BASE, "tastes"),
    "+ crosses": (*BASE, "crosses"),
    "+ both": (*BASE, "tastes", "crosses"),
}


def encoded(path: Path, file: Path, options: list[str]) -> Floats:
    """Embeddings [N, E] of the set's texts by the recipe's encoder; written to `file` once, then read from it."""
    if not file.exists():
        arguments = ["--config", str(RECIPE), "--data.dataset", str(path), *(f"--{option}" for option in options)]
        with distributed_device() as device:
            catalogue = build_experiment(load_config(with_recipe(arguments)), device).frozen_catalogue
        assert catalogue is not None, f"{path} has no texts"
        np.save(file, catalogue.float().cpu().numpy())
    return np.load(file, allow_pickle=False).astype(np.float32)


def scores(dataset: Dataset, groups: tuple[str, ...], text: Floats, part: str) -> dict[str, np.ndarray]:
    """User, item, second, label and score of every exposure of a part; the score is that of the regression."""
    model = fit_evidence(dataset, groups, text)
    evidence = Evidence(groups, model, ItemStatistics.of_dataset(dataset), dataset.action_values, text)
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("user", "item", "second", "label", "score")}
    for piece in dataset.sequences(dataset.row_groups(part)).pieces():
        targets = piece.exposures
        items, seconds = piece.item_ids[targets], piece.timestamps[targets]
        seen = visible_before(piece.timestamps, seconds)
        columns = evidence.columns(piece, seen, items, seconds, piece.user_id, fitted=False)
        values = (np.full(targets.size, piece.user_id), items, seconds, piece.labels[targets], columns @ model.weights)
        for name, value in zip(found, values, strict=True):
            found[name].append(value)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def halves(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Name of a half of the rows -> bool [n]; random halves are the same for every variant."""
    found = {"all": np.ones(rows["label"].size, bool)}
    for name in ("user", "item"):
        ids = np.unique(rows[name])
        first = np.isin(rows[name], np.random.default_rng(0).permutation(ids)[: ids.size // 2])
        found |= {f"{name}s, one half": first, f"{name}s, other half": ~first}
    early = rows["second"] < np.median(rows["second"])
    return found | {"earlier": early, "later": ~early}


def main() -> int:
    """Print a line for each set and variant: AUC/GAUC of all rows and of each half."""
    parser = experiment_parser(__doc__, "evidence")
    parser.add_argument("--sets", nargs="+", type=Path, required=True, help="directories of datasets with labels")
    parser.add_argument("--option", nargs="*", default=[], metavar="FIELD=VALUE", help="of the recipe")
    parser.add_argument("--part", choices=("valid", "test"), default="valid")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for path in options.sets:
        text, dataset = encoded(path, options.output / f"{path.name}.npy", options.option), Dataset.open(path)
        for name in options.only:
            rows = scores(dataset, VARIANTS[name], text, options.part)
            cells = []
            for half, chosen in halves(rows).items():
                user, label, score = (rows[key][chosen] for key in ("user", "label", "score"))
                cells.append(f"{half} {roc_auc(label, score):.4f}/{gauc(user, label, score):.4f}")
            print(f"{path.name} {name}: {', '.join(cells)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
