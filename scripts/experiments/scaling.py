"""Loss by size of the user encoder, of the Item LLM and of the training data: two grids, a power law, a plot.

    python scripts/experiments/scaling.py --output runs/scaling [--seeds 0] [--jobs 2] [--only user item] [--done]

Two grids on a leave-one-out dataset (data/ml-100k-loo). Every point is a run in a separate directory, so that the
script can be stopped and started again:

    user   a Llama over item IDs, four widths x four shares of the users to train on (`data.train_users`)
    item   the first 1, 2, 4 and 8 layers of a pretrained Item LLM x two widths of the user encoder, without item IDs

L is the cross-entropy (nats) of the next item over the complete catalogue, on the validation targets of all users, for
the checkpoint with the best validation NDCG@10 and the temperature with the lowest loss on these targets. N is the
number of the user encoder's parameters without tables, D the number of training events. L = E + A / N^a + B / D^b is
fitted to the first grid (least squares; errors by leaving out one point at a time). Writes scaling.json and
scaling.svg; each point has the FLOPs of its matrix products and its seconds.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import ROOT, experiment_parser, run_job
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import least_squares

from hllm_torchrec.common.machine import machine_info
from hllm_torchrec.common.run_log import read_log
from hllm_torchrec.distributed.process_group import distributed_device
from hllm_torchrec.evaluation.catalogue_retrieval import catalogue_vectors
from hllm_torchrec.evaluation.report_figures import INK, PALETTE, STYLE
from hllm_torchrec.evaluation.run_loader import LoadedRun, load_run

CONFIGS = ROOT / "configs" / "retrieval"
WIDTHS = (16, 32, 64, 128)
WIDTHS_OF_TEXT = (32, 128)
SHARES = (0.125, 0.25, 0.5, 1.0)
LAYERS = (1, 2, 4, 8)
SCALES = [2 ** (power / 4) for power in range(29)]
"""Logit scales (1 / temperature) that are tried: 1 to 128."""
EVALUATIONS = 8
"""Number of evaluations in each run."""


@dataclass(frozen=True)
class Variant:
    """One training: a configuration of configs/retrieval and the options that override it.

    layers: number of layers of the Item LLM, 0 without one; width: of the user encoder; share: share of the users who
    are trained on.
    """

    config: str
    layers: int
    width: int
    share: float
    options: tuple[str, ...]

    @property
    def grid(self) -> str:
        """Name of the grid, user or item."""
        return "item" if self.layers else "user"

    @property
    def name(self) -> str:
        """Name of the run's directory, without the seed."""
        size = f"{self.layers}x{self.width}" if self.layers else f"{self.width}"
        return f"{self.grid}-{size}-{self.share:g}"


@dataclass(frozen=True)
class Point:
    """Result of a variant. flops: of all matrix products, forward and backward; seconds: sum over training steps."""

    layers: int
    width: int
    share: float
    seed: int
    item_parameters: int
    parameters: int
    events: int
    loss: float
    ndcg_10: float
    steps: int
    flops: float
    seconds: float


def variants(epochs: float) -> list[Variant]:
    """Both grids. With a smaller share of the users the number of epochs is larger, so that all points of the user grid
    have about the same number of steps."""
    found = []
    for width, share in product(WIDTHS, SHARES):
        more = epochs / share
        options = [*of_width(width), "--data.train_users", f"{share:g}", f"--evaluation.every={more / EVALUATIONS:g}"]
        options += ["--stages", json.dumps([{"name": "ids", "epochs": more}])]
        found.append(Variant("llama_id", 0, width, share, tuple(options)))
    for layers, width in product(LAYERS, WIDTHS_OF_TEXT):
        stages = [{"name": "end to end", "epochs": 0.3}]
        stages += [{"name": "cached", "epochs": epochs, "item_embeddings": "cached"}]
        options = [*of_width(width), "--item_llm.layers", str(layers), f"--evaluation.every={epochs / EVALUATIONS:g}"]
        found.append(Variant("hllm", layers, width, 1.0, (*options, "--stages", json.dumps(stages))))
    return found


def of_width(width: int) -> list[str]:
    """Options for a user encoder of this width: a Llama of two layers."""
    shape = {"model_type": "llama", "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 2}
    return ["--user.shape", json.dumps(shape | {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 8})]


def train(variant: Variant, seed: int, output: Path, more: list[str]) -> Path:
    """Train a variant, if not done; return its run directory."""
    run = output / f"{variant.name}-{seed}"
    arguments = ["--config", str(CONFIGS / f"{variant.config}.yaml"), "--seed", str(seed), "--output", str(run)]
    run_job("train", [*arguments, "--resume", "true", *variant.options, *more], run / "output.log", run / "trained")
    (run / "trained").touch()
    return run


def measure(variant: Variant, seed: int, run: Path, device: torch.device) -> Point:
    """Measure a trained run; the result is written to its directory and read from there the next time."""
    file = run / "point.json"
    if file.is_file():
        return Point(**json.loads(file.read_text()))
    loaded, log = load_run(run, "best", device), read_log(run)
    hllm = loaded.experiment.hllm
    steps = [line for line in log if line["event"] == "step"]
    (peak,) = {line["matmul_peak"] for line in log if line["event"] == "start"}
    point = Point(
        *(variant.layers, variant.width, variant.share, seed),
        item_parameters=sum(weight.numel() for weight in hllm.item_llm.parameters()) if hllm.item_llm else 0,
        parameters=sum(weight.numel() for weight in hllm.user.parameters()),
        events=events_of(loaded),
        loss=cross_entropy(loaded),
        ndcg_10=max(line["ndcg@10"] for line in log if line["event"] == "eval"),
        steps=len(steps),
        flops=sum(line["mfu"] * line["seconds"] * peak for line in steps),
        seconds=sum(line["seconds"] for line in steps),
    )
    file.write_text(json.dumps(asdict(point)))
    return point


def events_of(loaded: LoadedRun) -> int:
    """Number of training events of the users who are trained on."""
    pieces = loaded.experiment.loader("train", 1, training=True).pieces
    return int((pieces.end - pieces.first_target).sum())


@torch.no_grad()
def cross_entropy(loaded: LoadedRun) -> float:
    """Mean of -log softmax(scale x cosine)[target] over the complete catalogue, for the validation targets.

    The scale is the one of SCALES with the lowest loss on these targets, because the best scale depends on how long the
    model was trained.
    """
    experiment, total, rows = loaded.experiment, torch.zeros(len(SCALES), dtype=torch.float64), 0
    experiment.model.eval()
    with loaded.weights, experiment.evaluation_items():
        items_ND = torch.nn.functional.normalize(catalogue_vectors(experiment).float(), dim=-1)
        for batch in experiment.loader("valid", 128).batches(0):
            predicted_RD = experiment.model(batch, want_next=True).next_items
            assert predicted_RD is not None, "retrieval needs the generative loss"
            seen = batch.query_visible[batch.target_query] > 0
            scores_RN = torch.nn.functional.normalize(predicted_RD[seen].float(), dim=-1) @ items_ND.T
            scores_RN[:, 0] = -math.inf  # the unknown item
            target_R = batch.target_items[seen]
            losses = [
                torch.nn.functional.cross_entropy(scale * scores_RN, target_R, reduction="sum") for scale in SCALES
            ]
            total, rows = total + torch.stack(losses).double(), rows + len(target_R)
    return float(total.min()) / rows


def fit(points: Sequence[Point]) -> dict[str, Any]:
    """Fit E, A, a, B, b of L = E + A / N^a + B / D^b; return them, jackknife errors, and the explained variance."""
    n, d, loss = (np.array([getattr(point, name) for point in points], float) for name in FITTED)
    best = _fit(n, d, loss)
    every = np.arange(len(points))
    others = np.array([_fit(n[every != i], d[every != i], loss[every != i]) for i in every])
    spread = np.sqrt((len(points) - 1) / len(points) * ((others - others.mean(0)) ** 2).sum(0))
    rest = loss - law(best, n, d)
    names = ("E", "A", "a", "B", "b")
    explained = 1 - float((rest**2).sum() / ((loss - loss.mean()) ** 2).sum())
    return {
        "parameters": dict(zip(names, best.tolist(), strict=True)),
        "jackknife_errors": dict(zip(names, spread.tolist(), strict=True)),
        "explained": explained,
        "largest_residual": float(np.abs(rest).max()),
    }


FITTED = ("parameters", "events", "loss")


def law(constants: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """E + A / N^a + B / D^b with N and D in units of 10^4, so that A and B are the terms at N = 10^4 and D = 10^4."""
    floor, by_size, a, by_data, b = constants
    return floor + by_size * (n / 1e4) ** -a + by_data * (d / 1e4) ** -b


def _fit(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Least-squares estimate of the constants [5], all >= 0: the best result of several starting points."""
    starts = [[loss.min() * share, 0.5, a, 0.5, b] for share in (0.2, 0.9) for a in (0.1, 0.5) for b in (0.1, 0.5)]
    upper = [loss.min(), np.inf, 3.0, np.inf, 3.0]
    found = [least_squares(lambda x: law(x, n, d) - loss, start, bounds=(0, upper)) for start in starts]
    best: np.ndarray = min(found, key=lambda result: result.cost).x
    return best


def plot(points: Sequence[Point], fitted: dict[str, Any] | None, file: Path) -> None:
    """Plot the loss by encoder size (a line per share of the data), by data (a line per width), by Item LLM layers."""
    users = [point for point in points if not point.layers]
    items = [point for point in points if point.layers]
    with rc_context(STYLE):
        figure = Figure(figsize=(3.5 * (2 + bool(items)), 3.4))
        axes = figure.subplots(1, 2 + bool(items))
        _lines(axes[0], users, "parameters", "share", fitted)
        _lines(axes[1], users, "events", "width", fitted)
        axes[0].set(xlabel="parameters of the user encoder", ylabel="validation loss, nats", title="User encoder")
        axes[1].set(xlabel="events trained on", title="Data")
        if items:
            for colour, width in zip(PALETTE, sorted({p.width for p in items}), strict=False):
                own = sorted((p for p in items if p.width == width), key=lambda p: p.layers)
                axes[2].plot([p.layers for p in own], [p.loss for p in own], "o-", color=colour, label=f"{width}", ms=4)
            axes[2].legend(title="width", labelcolor=INK)
            axes[2].set(xlabel="layers of the Item LLM", title="Item LLM (text alone)", xscale="log")
            axes[2].set_xticks(LAYERS, [str(layers) for layers in LAYERS])
            axes[2].minorticks_off()
        figure.savefig(file)


def _lines(axes: Axes, points: list[Point], x: str, kind: str, fitted: dict[str, Any] | None) -> None:
    """Plot the points by `x`, with a color for each value of `kind`, and the fitted law as lines."""
    for colour, value in zip(PALETTE, sorted({getattr(point, kind) for point in points}), strict=False):
        own = sorted((p for p in points if getattr(p, kind) == value), key=lambda p: getattr(p, x))
        axes.plot([getattr(p, x) for p in own], [p.loss for p in own], "o", color=colour, label=f"{value:g}", ms=4)
        if fitted:
            n, d = (np.array([getattr(p, name) for p in own], float) for name in FITTED[:2])
            axes.plot([getattr(p, x) for p in own], law(np.array([*fitted["parameters"].values()]), n, d), color=colour)
    axes.legend(title={"share": "share of users", "width": "width"}[kind], labelcolor=INK)
    axes.set_xscale("log")
    axes.set_xticks(ticks := sorted({getattr(p, x) for p in points}), [f"{tick / 1e3:.0f}k" for tick in ticks])
    axes.minorticks_off()


def markdown(points: Sequence[Point]) -> str:
    """A line for each point."""
    lines = ["| layers | width | users | parameters | events | loss | NDCG@10 | 10^12 operations | seconds |"]
    lines.append("|---" * 9 + "|")
    for p in points:
        size = f"{p.layers} | {p.width} | {p.share:g} | {p.item_parameters + p.parameters:,} | {p.events:,}"
        lines.append(f"| {size} | {p.loss:.3f} | {p.ndcg_10:.4f} | {p.flops / 1e12:.1f} | {p.seconds:.0f} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = experiment_parser(__doc__, "scaling", seeds=[0])
    parser.add_argument("--epochs", type=float, default=16.0, help="epochs if all users are trained on (default: 16)")
    parser.add_argument("--only", nargs="+", choices=("user", "item"), default=["user", "item"])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one process each")
    parser.add_argument("--done", action="store_true", help="train nothing, use what is complete")
    parser.add_argument("more", nargs="*", help="options of every training, after --")
    return parser.parse_args()


def main() -> int:
    """Train what is missing, measure, fit, plot."""
    options = parse()
    output = options.output.absolute()
    jobs = [(v, seed) for seed in options.seeds for v in variants(options.epochs) if v.grid in options.only]
    if options.done:
        jobs = [(v, seed) for v, seed in jobs if (output / f"{v.name}-{seed}" / "trained").is_file()]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(lambda job: train(*job, output, options.more), jobs))
    with distributed_device() as device:
        points = [measure(*job, run, device) for job, run in zip(jobs, runs, strict=True)]
    users = [point for point in points if not point.layers]
    fitted = fit(users) if len(users) >= 8 else None
    plot(points, fitted, output / "scaling.svg")
    found = {"machine": machine_info(), "fit": fitted, "points": [asdict(point) for point in points]}
    (output / "scaling.json").write_text(json.dumps(found, indent=1))
    print(markdown(points))
    print(json.dumps({"fit": fitted}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
