"""Groups of `data.evidence` on the validation part: a logistic regression on their columns alone, on several datasets.

    python scripts/experiments/evidence_groups.py --sets data/ml-100k data/ml_small --output runs/evidence

Fits `data.evidence` with each list of groups of VARIANTS, and prints AUC and GAUC of the validation exposures: all, and
those of random halves of the users, of the items, and of the earlier and later half of the time. The texts are encoded
once by configs/recipes/ranking.yaml into OUTPUT/<set>.npy (`--option` changes it, such as item_llm.pretrained=DIR).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

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

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "recipes" / "ranking.yaml"
BASE = ("factors", "items", "users", "neighbors")
VARIANTS = {
    "four groups": BASE,
    "+ tastes": (*BASE, "tastes"),
    "+ crosses": (*BASE, "crosses"),
    "+ both": (*BASE, "tastes", "crosses"),
}


def encoded(path: Path, file: Path, options: list[str]) -> Floats:
    """[N, E] embeddings of the set's texts by the recipe's encoder, from `file` or into it."""
    if not file.exists():
        arguments = ["--config", str(RECIPE), "--data.dataset", str(path), *(f"--{option}" for option in options)]
        with distributed_device() as device:
            catalogue = build_experiment(load_config(with_recipe(arguments)), device).frozen_catalogue
        assert catalogue is not None, f"{path} has no texts"
        np.save(file, catalogue.float().cpu().numpy())
    return np.load(file, allow_pickle=False).astype(np.float32)


def scores(dataset: Dataset, groups: tuple[str, ...], text: Floats) -> dict[str, np.ndarray]:
    """User, item, second, label and score of every validation exposure, by the regression on the groups alone."""
    model = fit_evidence(dataset, groups, text)
    evidence = Evidence(groups, model, ItemStatistics.of_dataset(dataset), dataset.action_values, text)
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("user", "item", "second", "label", "score")}
    for piece in dataset.sequences(dataset.row_groups("valid")).pieces():
        targets = piece.exposures
        items, seconds = piece.item_ids[targets], piece.timestamps[targets]
        seen = visible_before(piece.timestamps, seconds)
        columns = evidence.columns(piece, seen, items, seconds, piece.user_id, fitted=False)
        values = (np.full(targets.size, piece.user_id), items, seconds, piece.labels[targets], columns @ model.weights)
        for name, value in zip(found, values, strict=True):
            found[name].append(value)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def halves(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Name of a half of the rows -> bool [n]; random ones are the same for every variant."""
    found = {"all": np.ones(rows["label"].size, bool)}
    for name in ("user", "item"):
        ids = np.unique(rows[name])
        first = np.isin(rows[name], np.random.default_rng(0).permutation(ids)[: ids.size // 2])
        found |= {f"{name}s, one half": first, f"{name}s, other half": ~first}
    early = rows["second"] < np.median(rows["second"])
    return found | {"earlier": early, "later": ~early}


def main() -> int:
    """Print a line for each set and variant: AUC/GAUC of all rows and of each half."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", type=Path, required=True, help="directories of datasets with labels")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "evidence")
    parser.add_argument("--option", nargs="*", default=[], metavar="FIELD=VALUE", help="of the recipe")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for path in options.sets:
        text, dataset = encoded(path, options.output / f"{path.name}.npy", options.option), Dataset.open(path)
        for name, groups in VARIANTS.items():
            rows = scores(dataset, groups, text)
            cells = []
            for half, kept in halves(rows).items():
                user, label, score = (rows[key][kept] for key in ("user", "label", "score"))
                cells.append(f"{half} {roc_auc(label, score):.4f}/{gauc(user, label, score):.4f}")
            print(f"{path.name} {name}: {', '.join(cells)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
