"""`hllm calibrate`: fits a calibration of a run's probabilities on the validation part.

    hllm calibrate --run-dir runs/quickstart --method platt
    torchrun --nproc_per_node 2 -m hllm_torchrec.launch.calibrate --run-dir runs/quickstart --method isotonic

The job scores the validation part, fits a function of the logit for each binary task, and writes calibration.json into
the run. Then `hllm evaluate` shows the run with and without calibration, and `Scorer.score_tasks` returns calibrated
probabilities; scores and their order do not change. A calibration is valid for one checkpoint: fit it again after
further training. docs/tasks.md explains the choice of the method.
"""

import argparse
import sys
from typing import TYPE_CHECKING

from hllm_torchrec.common.terminal import say
from hllm_torchrec.launch.entry import CommandParser, entry_point

if TYPE_CHECKING:
    from hllm_torchrec.evaluation.calibration import RunCalibration


def build_parser() -> CommandParser:
    """Build the command line parser."""
    parser = CommandParser(prog="hllm calibrate", description=__doc__)
    parser.add_run()
    parser.add_argument(
        "--method",
        choices=("platt", "isotonic", "temperature"),
        default="platt",
        help="platt: slope and intercept of the logit; temperature: slope alone; isotonic: any increasing function, "
        "for thousands of positives (default: platt)",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Score the validation part, fit the calibration and write it.

    Raises:
        ValueError: the run or checkpoint does not exist, the run has no ranking head, the labels of its first task
            are of one class, or scikit-learn is not installed.
    """
    from hllm_torchrec.checkpoint.remote_runs import RunStorage, local_run
    from hllm_torchrec.common.urls import url_of
    from hllm_torchrec.distributed.coordination import run_on_rank_zero
    from hllm_torchrec.distributed.process_group import distributed_device
    from hllm_torchrec.evaluation.calibration import fit_calibration
    from hllm_torchrec.evaluation.run_loader import run_config, score_run, training_overlap

    if not run_config(args.run, args.dataset).objective.has_head:
        raise ValueError(f"{args.run}: objective.fusion 'none': the run has no probabilities to calibrate")
    storage = RunStorage(local_run(args.run), url_of(args.run))
    with distributed_device() as device:
        scores = score_run(args.run, "valid", args.checkpoint, device, args.dataset)
        predictions = scores.predictions
        assert predictions is not None
        fingerprint = scores.provenance["weights"]["fingerprint"]
        overlap = training_overlap(predictions, scores.trained_on)

        def fit() -> None:
            found = fit_calibration(predictions, fingerprint, args.method)
            say(calibration_summary(found))
            if overlap.seen:
                say(
                    f"  caution: the run was trained on {overlap.seen:,} of these {overlap.exposures:,} exposures, for "
                    "which its probabilities look better than they are"
                )
            say(f"calibration: {found.save(storage.folder)}")

        run_on_rank_zero(fit)
        storage.publish()


def calibration_summary(found: "RunCalibration") -> str:
    """Lines that describe each task's calibrator, with a caution for one that reverses the order of the scores."""
    lines = []
    for name, one in found.tasks.items():
        numbers = (
            f"{len(one.x)} points" if one.method == "isotonic" else f"slope {one.x[0]:.4f}, intercept {one.y[0]:+.4f}"
        )
        lines.append(f"{name or 'first label'}: {one.method}, {numbers}")
        if one.method != "isotonic" and one.x[0] <= 0:
            lines.append("  caution: the slope is not above 0: probabilities fall where scores rise; too few labels?")
    return "\n".join(lines)


main = entry_point(build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
