"""Validation NDCG@10 of trained runs by the weights of `objective.text_similarity` and `transitions`, without training.

    python scripts/experiments/text_weights.py --runs runs/benchmark/steam/text_id/seed-0 runs/...

For every run the script prints a table by decay and weight of the texts: with weight 0 items are ranked by the learned
similarity alone, with weight inf by the similarity to the texts of the history alone, which needs no training. For a
run with transitions it also prints a table by the weights of texts and transitions, with and without the learned
similarity. Finally it prints the result of texts alone by the treatment of their embeddings: unchanged, centered,
standardized, and whitened with several shrinkages.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from hllm_torchrec.distributed.process_group import distributed_device
from hllm_torchrec.evaluation.catalogue_retrieval import catalogue_vectors
from hllm_torchrec.evaluation.retrieval_comparison import gains
from hllm_torchrec.evaluation.run_loader import load_run
from hllm_torchrec.evaluation.scoring import CompleteHistories
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.modules.features.standardize import Standardize, Whiten
from hllm_torchrec.modules.features.text_similarity import TextSimilarity
from hllm_torchrec.modules.features.transition_similarity import TransitionSimilarity

WEIGHTS = (0.0, 0.1, 0.2, 0.4, 0.6, 1.0, math.inf)
DECAYS = (0.5, 0.7, 0.85)
TEXTS, TRANSITIONS = (0.0, 0.3, 0.6, 1.0), (0.0, 0.2, 0.4, 0.7, 1.2)


@dataclass(frozen=True)
class Targets:
    """Validation targets [n] of a batch, the batch's histories, and the items seen by each target's user (jagged).

    learned: see `read_targets`; rows: [n] packed position of the latest event before each target.
    """

    learned: Tensor
    item_ids: Tensor
    seq_offsets: Tensor
    rows: Tensor
    targets: Tensor
    seen: tuple[Tensor, Tensor]


@torch.no_grad()
def read_targets(experiment: Experiment) -> Iterator[Targets]:
    """Batches of the validation part; `learned` are unit vectors [n, D] of the next item by the user encoder."""
    loader = experiment.loader("valid", experiment.config.evaluation.batch_users)
    histories = CompleteHistories(loader)
    for step, batch in enumerate(loader.batches(0)):
        out = experiment.hllm(batch, want_next=True).next_items
        pieces = torch.repeat_interleave(torch.arange(batch.user_ids.numel()), batch.query_offsets.diff())
        visible = batch.query_visible[batch.target_query]
        wanted = torch.nonzero(visible > 0).flatten()
        last = batch.seq_offsets[pieces[batch.target_query]] + visible - 1
        seen = histories.seen_items(step, batch, wanted)
        yield Targets(
            F.normalize(out[wanted], dim=-1), batch.item_ids, batch.seq_offsets, last[wanted],
            batch.target_items[wanted], seen,
        )  # fmt: skip


def texts_of(parts: list[Targets], unit_items: Tensor, decay: float) -> list[Tensor]:
    """Cosines [n, N] of each target's decayed history with all texts; unit_items: [N, E]."""
    similarity = TextSimilarity(1.0, decay)
    sums = (similarity.history(unit_items[part.item_ids], part.seq_offsets)[part.rows] for part in parts)
    return [F.normalize(rows, dim=-1) @ unit_items.T for rows in sums]


def ndcg(parts: list[Targets], scores: Callable[[int], Tensor]) -> float:
    """NDCG@10 of the scores [n, N] of each part; seen items and item 0 are not candidates."""
    ranks = []
    for number, part in enumerate(parts):
        score = scores(number)
        own = score.gather(1, part.targets[:, None])
        users = torch.repeat_interleave(torch.arange(len(score)), part.seen[1].diff())
        better = score > own
        better[users, part.seen[0]] = False
        better[:, 0] = False
        ranks.append(1 + better.sum(1))
    return float(gains(torch.cat(ranks).numpy(), "ndcg@10").mean())


def print_transitions(
    parts: list[Targets], learned: Tensor, unit_items: Tensor, transitions: TransitionSimilarity
) -> None:
    """Print NDCG@10 by the weights of texts (rows) and transitions (columns), with and without the learned similarity.

    learned: [N, D] and unit_items: [N, E] of all items.
    """
    texts, weight = texts_of(parts, unit_items, transitions.decay), transitions.weight
    flows = [
        transitions.history(part.item_ids, part.seq_offsets)[part.rows] @ transitions.target.T / weight
        for part in parts
    ]
    for share in (1.0, 0.0):
        columns = " | ".join(f"{weight:g}" for weight in TRANSITIONS)
        print(
            f"\n| {'learned' if share else 'nothing learned'} | {columns} |\n" + "|---" * (len(TRANSITIONS) + 1) + "|"
        )
        for of_texts in TEXTS:
            cells = []
            for of_flows in TRANSITIONS:

                def score(n: int, weights: tuple[float, float] = (of_texts, of_flows), share: float = share) -> Tensor:
                    return share * (parts[n].learned @ learned.T) + weights[0] * texts[n] + weights[1] * flows[n]

                cells.append(f"{ndcg(parts, score):.4f}" if share or of_texts or of_flows else "")
            print(f"| texts {of_texts:g} | {' | '.join(cells)} |", flush=True)


def treatments(items: Tensor) -> dict[str, Tensor]:
    """Embeddings [N, E] of the items by their treatment."""
    found = {"as they are": items, "centered": items - items[1:].mean(0)}
    modules = {"standardised": Standardize(items.shape[1])}
    modules |= {f"whitened, shrinkage {s}": Whiten(items.shape[1], s) for s in (0.01, 0.1, 1.0)}
    for name, module in modules.items():
        module.measure(items[1:])
        found[name] = module(items)
    return {name: F.normalize(x, dim=-1) for name, x in found.items()}


def tabulate(run: Path, device: torch.device) -> None:
    """Print the tables of a run."""
    loaded = load_run(run, "best", device)
    experiment, hllm = loaded.experiment, loaded.experiment.hllm
    with loaded.weights, torch.no_grad():
        experiment.use_cached_items()
        transitions, hllm.transitions, hllm.text_similarity = hllm.transitions, None, None
        hllm.eval()
        parts = list(read_targets(experiment))
        learned = F.normalize(catalogue_vectors(experiment), dim=-1)
        items = experiment.encode_catalogue()
    assert items is not None, f"{run}: a model without texts"
    unit = treatments(items)
    print(f"\n{experiment.dataset.name} ({run.name})\n\n| decay | {' | '.join(f'{w:g}' for w in WEIGHTS)} |")
    print("|---" * (len(WEIGHTS) + 1) + "|")
    for decay in DECAYS:
        texts = texts_of(parts, unit["whitened, shrinkage 0.1"], decay)
        cells = []
        for weight in WEIGHTS:
            share = (0.0, 1.0) if math.isinf(weight) else (1.0, weight)

            def score(n: int, share: tuple[float, float] = share, texts: list[Tensor] = texts) -> Tensor:
                return share[0] * (parts[n].learned @ learned.T) + share[1] * texts[n]

            cells.append(f"{ndcg(parts, score):.4f}")
        print(f"| {decay} | {' | '.join(cells)} |", flush=True)
    if transitions is not None:
        print_transitions(parts, learned, unit["whitened, shrinkage 0.1"], transitions)
    for name, rows in unit.items():
        texts = texts_of(parts, rows, 0.7)
        print(f"texts alone, {name}: {ndcg(parts, texts.__getitem__):.4f}", flush=True)


def main() -> int:
    """Print the tables of all runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", type=Path, required=True)
    options = parser.parse_args()
    with distributed_device() as device:
        for run in options.runs:
            tabulate(run, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
