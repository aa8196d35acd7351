#!/usr/bin/env python3
"""Mutation test: breaks the code in thirty-five places, one at a time, and checks that a test fails.

    python scripts/reliability/breaks.py                     # all breaks, about a quarter of an hour
    python scripts/reliability/breaks.py attention gate      # the breaks whose names contain one of the words
    python scripts/reliability/breaks.py --fast              # only with the tests that scripts/test.sh --fast runs

Each break is made in a copy of the tree, and the tests that the break names are run there until one fails. The tests
that failed are then run in the copy without a break, because a test that always fails detects nothing. Exit status: 0
if all breaks were caught; 1 if a break was not, if the text of a break does not occur in the code exactly once, or if a
test that failed also fails without a break.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = ("hllm_torchrec", "modules", "launch")
NOT_COPIED = (".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", "__pycache__", "runs", "data-*")
SECONDS = 900
"""Time limit of a run of tests. A break of a collective may make the tests hang; it is then counted as caught."""


@dataclass(frozen=True)
class Break:
    """A change of the code: `old`, which occurs in the code exactly once, is replaced by `new`.

    tests: arguments of pytest that select the tests, such as paths and -k.
    """

    name: str
    old: str
    new: str
    tests: tuple[str, ...]


BREAKS = (
    # modules
    Break(
        "losses: the user's own items are negatives",
        "in_sequence[row_of_sequence[self.sequence_of_excluded], self.column_of_excluded] = True",
        "in_sequence[row_of_sequence[self.sequence_of_excluded], self.column_of_excluded] = False",
        ("tests/modules/losses/test_objectives.py",),
    ),
    Break(
        "losses: the gradient through a norm",
        "slopes = torch.where(inverse < 1 / EPS, -inverse.square(), 0.0)",
        "slopes = torch.where(inverse < 1 / EPS, -inverse, 0.0)",
        ("tests/modules/losses/test_objectives.py",),
    ),
    Break(
        "attention: a query sees one event more",
        "hidden=keys[None, None, :] >= visible[:, :, None]",
        "hidden=keys[None, None, :] > visible[:, :, None]",
        ("tests/modules/attention/test_packed.py",),
    ),
    Break(
        "attention: history sees its future",
        "dropout_p=dropout, is_causal=causal, scale=scaling,",
        "dropout_p=dropout, is_causal=False, scale=scaling,",
        ("tests/modules/attention/test_packed.py",),
    ),
    Break(
        "hstu: the divisor leaves out the row itself",
        "(position - prefix).clamp(min=0).add(1).clamp(max=window)",
        "(position - prefix).clamp(min=0).clamp(max=window)",
        ("tests/modules/hstu/test_layer.py",),
    ),
    Break(
        "hstu: a query's own key without SiLU",
        "own = F.silu(scores)[:, :, None] * v[history:]",
        "own = scores[:, :, None] * v[history:]",
        ("tests/modules/hstu/test_layer.py",),
    ),
    Break(
        "hybrid features: slots without a time get the MLP's bias",
        "terms.append(merged * has_time[:, None])",
        "terms.append(merged)",
        ("tests/modules/features/test_hybrid.py",),
    ),
    Break(
        "timestamps: the length of four years",
        "day_of_era // 1_460",
        "day_of_era // 1_461",
        ("tests/modules/features/test_timestamps.py",),
    ),
    # data
    Break(
        "visibility: an exposure sees its own second",
        'found = np.searchsorted(times, at, side="left")',
        'found = np.searchsorted(times, at, side="right")',
        ("tests/data/test_collate.py",),
    ),
    Break(
        "collate: the first target of a piece is lost",
        "wanted = following >= piece.first",
        "wanted = following > piece.first",
        ("tests/data/test_collate.py",),
    ),
    Break(
        "numeric features: the same second counts as earlier",
        "seen = visible_before(timestamps, timestamps[targets] - delay)",
        "seen = visible_before(timestamps, timestamps[targets] - delay + 1)",
        ("tests/data/test_numeric_features.py",),
    ),
    Break(
        "loader: a resumed epoch begins anew",
        "for step in range(first_step, self.steps(epoch))",
        "for step in range(self.steps(epoch))",
        ("tests/data/test_loader.py",),
    ),
    Break(
        "split: the event at the cut goes into the part before",
        "(timestamps == cut.timestamp) & (orders >= cut.order)",
        "(timestamps == cut.timestamp) & (orders > cut.order)",
        ("tests/data/test_prepare.py",),
    ),
    Break(
        "prepare: a dataset made with other options is reused",
        'if existing is not None and existing["request"] == request and not replaces:',
        "if existing is not None and not replaces:",
        ("tests/data/test_prepare.py",),
    ),
    # metrics
    Break(
        "GAUC: a tie counts as a correct order",
        "positives * (below + negatives / 2)",
        "positives * (below + negatives)",
        ("tests/metrics/test_metric_oracles.py",),
    ),
    Break(
        "exact AUC: a tie counts as a wrong order",
        "(mass[0] * (under[1] + upto[1])).sum().item()",
        "(mass[0] * (under[1] + under[1])).sum().item()",
        ("tests/metrics/test_exact_auc.py",),
    ),
    Break(
        "GAUC: negatives of the previous users count",
        "below = negatives.cumsum() - negatives - before[tie_groups]",
        "below = negatives.cumsum() - negatives",
        ("tests/evaluation/test_offline_evaluation.py",),
    ),
    Break(
        "gate: a drop within chance fails",
        "elif low > 0:\n        status, reason =",
        "elif high > 0:\n        status, reason =",
        ("tests/evaluation/test_regression_gate.py",),
    ),
    # stores and checkpoints
    Break(
        "store: the manifest names files that may not be on the disk",
        "            _sync(self.folder / name)\n",
        "",
        ("tests/store/test_commit.py",),
    ),
    Break(
        "store: altered bytes go unnoticed",
        "if checksum is not None and crc32_file(path) != checksum:",
        "if checksum is not None and crc32_file(path) < 0:",
        ("tests/store/test_store.py",),
    ),
    Break(
        "checkpoint: a crash before the final rename loses it",
        "            leftover.rename(final)\n",
        "            pass\n",
        ("tests/checkpoint/test_checkpoint.py", "-k", "crash or caught"),
    ),
    Break(
        "checkpoint: the unpickler finds any class",
        "if name not in _ALLOWED.get(module, ()):",
        'if name == "":',
        ("tests/checkpoint/test_checkpoint.py", "-k", "pickle"),
    ),
    # ranks
    Break(
        "trainer: the loss is not scaled by the ranks",
        "(loss * self.world_size).backward()",
        "loss.backward()",
        ("tests/training/test_trainer.py", "-k", "rank or ranks"),
    ),
    Break(
        "exchange: a gradient of gathered rows is a mean",
        "copies.view(n_ranks, ctx.n_rows, *grad.shape[1:]).sum(dim=0), None",
        "copies.view(n_ranks, ctx.n_rows, *grad.shape[1:]).mean(dim=0), None",
        ("tests/distributed/test_collectives.py",),
    ),
    Break(
        "exchange: owners by number instead of cost",
        "heapq.heapreplace(loads, (load + cost, rank))",
        "heapq.heapreplace(loads, (load + 1, rank))",
        ("tests/distributed/test_collectives.py",),
    ),
    # configuration, training, serving
    Break(
        "config: weights and a shape are both taken",
        "(part.pretrained is None) == (part.shape is None)",
        "part.pretrained is None and part.shape is None",
        ("tests/config/test_config.py",),
    ),
    Break(
        "stages: a cached stage trains the Item LLM",
        "            if cached:\n                self.experiment.use_cached_items()\n",
        "",
        ("tests/training/test_trainer.py", "-k", "cached"),
    ),
    Break(
        "EMA: decay and 1 - decay are exchanged",
        "self._averages[name].lerp_(parameter.detach(), 1.0 - decay)",
        "self._averages[name].lerp_(parameter.detach(), decay)",
        ("tests/training/test_optim.py",),
    ),
    Break(
        "optimizer: gradients are not clipped",
        "torch.nn.utils.clip_grads_with_norm_(members, max_norm, total)",
        "torch.nn.utils.clip_grads_with_norm_(members, math.inf, total)",
        ("tests/training/test_optim.py",),
    ),
    Break(
        "checkpoint: half a checkpoint gets its final name",
        "if not final.exists() and find_damage(leftover, check_hashes=False) is None:",
        "if not final.exists():",
        ("tests/checkpoint/test_checkpoint.py", "-k", "half_a_checkpoint"),
    ),
    Break(
        "checkpoint: the final name before the marker",
        "    write_synced(temporary / MARKER, marker_text(marker, files))\n    sync_folder(temporary)\n",
        "    temporary = temporary.rename(final)\n    write_synced(final / MARKER, marker_text(marker, files))\n",
        ("tests/checkpoint/test_checkpoint.py", "-k", "marker_is_there"),
    ),
    Break(
        "serving: the window does not move with new events",
        "if start != user.start or user.cache.length < self.hllm.user.context_prefix:",
        "if user.cache.length < self.hllm.user.context_prefix:",
        ("tests/serving/test_scorer.py",),
    ),
    # creative
    Break(
        "creatives: a writer sees a like of the same second",
        "seen = liked.item_ids[max(0, before - selection.history) : before].tolist()",
        "seen = liked.item_ids[max(0, before + 1 - selection.history) : before + 1].tolist()",
        ("tests/creative/writing/test_pipeline.py",),
    ),
    Break(
        "creatives: the key of an answer leaves out the model",
        "[self.stage, writer, self.system, self.prompt, self.max_tokens, self.temperature, self.seed]",
        "[self.stage, self.system, self.prompt, self.max_tokens, self.temperature, self.seed]",
        ("tests/creative/writing/test_pipeline.py",),
    ),
    Break(
        "creatives: instructions in a description count as facts",
        "return [one for one in _SENTENCE_END.split(description) if not _TO_A_MODEL.search(one)]",
        "return _SENTENCE_END.split(description)",
        ("tests/creative/test_filters.py",),
    ),
)


def place_of(text: str, root: Path) -> Path:
    """The file of the code that contains `text`.

    Raises:
        ValueError: the code contains `text` several times, or not at all.
    """
    files = [path for folder in CODE for path in sorted((root / folder).rglob("*.py"))]
    found = [(path, path.read_text(encoding="utf-8").count(text)) for path in files]
    places = [path for path, count in found for _ in range(count)]
    if len(places) != 1:
        where = "in " + ", ".join(str(path.relative_to(root)) for path in places) if places else "nowhere"
        raise ValueError(f"{text!r} must occur in the code exactly once, but occurs {where}: adapt the break")
    return places[0]


def run_tests(arguments: list[str], root: Path, marks: str, stop: bool = True) -> tuple[int | None, str]:
    """Run pytest; return its exit status (None: it hung) and its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *["-x"] * stop, "-m", marks, *arguments]
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout + done.stderr


def try_break(broken: Break, root: Path, marks: str) -> tuple[bool, str]:
    """Make a break in the copy at `root` and run its tests.

    Returns:
        True and the name of the first test that fails, or False and the reason.
    """
    path = place_of(broken.old, root)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(broken.old, broken.new), encoding="utf-8")
    try:
        status, said = run_tests(list(broken.tests), root, marks)
    finally:
        path.write_text(text, encoding="utf-8")
    if status is None:
        return True, f"a hang of {SECONDS} s"
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+?\.py::.+?)(?: - .*)?$", said, flags=re.MULTILINE)
    if status == 1 and failed:
        return True, failed[0]
    if status == 0:
        return False, "every test passed"
    return False, f"the tests did not run (status {status}): {said.strip().splitlines()[-1]}"


def main() -> int:
    """Try the breaks; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", help="words that the names of the breaks contain (default: all breaks)")
    parser.add_argument("--fast", action="store_true", help="leave out the tests marked slow")
    options = parser.parse_args()
    marks = "not slow and not long" if options.fast else "not long"
    chosen = [b for b in BREAKS if not options.words or any(word in b.name for word in options.words)]
    caught_by, missed = [], 0
    with tempfile.TemporaryDirectory(prefix="breaks-") as folder:
        root = Path(folder) / "tree"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*NOT_COPIED))
        for broken in chosen:
            started = time.monotonic()
            try:
                caught, by = try_break(broken, root, marks)
            except ValueError as error:
                caught, by = False, str(error)
            missed += not caught
            if caught and "::" in by:
                caught_by.append(by)
            print(f"{'caught' if caught else 'MISSED'}  {broken.name}: {by} ({time.monotonic() - started:.0f} s)")
            sys.stdout.flush()
        status, said = run_tests(sorted(set(caught_by)), root, marks, stop=False) if caught_by else (0, "")
    if status != 0:
        print(f"tests that caught a break also fail without it:\n{said[-2000:]}")
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return int(missed > 0 or status != 0)


if __name__ == "__main__":
    sys.exit(main())
