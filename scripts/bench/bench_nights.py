"""CPU seconds of each step of a nightly job, by the number of events in the dataset before the night.

    python scripts/bench/bench_nights.py [--quick] [--out FILE]

A synthetic shop has a fixed number of users and a history of several lengths. After a warm-up night, each of three
timed nights adds one day of 2,000 pages. The model is small (IDs and genres, one layer), and starts from a published
run with its optimizer state. `night_<events>` is the time of a night after that number of events / after the smallest
number, the median over the nights. `day_<events>` is the same ratio without the step embed, which writes the vectors of
all users. Seconds are CPU seconds of the process, because the machine may be shared.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from benchmarking import ROOT, arguments, ratio, report, say

sys.path.insert(0, str(ROOT / "scripts" / "experiments"))
import shop  # noqa: E402

from hllm_torchrec.config.loading import load_config  # noqa: E402
from hllm_torchrec.data.prepare import prepare  # noqa: E402
from hllm_torchrec.data.sources.table_mapping import table  # noqa: E402
from hllm_torchrec.data.split import Split  # noqa: E402
from hllm_torchrec.distributed.process_group import distributed_device  # noqa: E402
from hllm_torchrec.lifecycle.night_config import AppendConfig, GateConfig, NightConfig  # noqa: E402
from hllm_torchrec.lifecycle.night_state import STEPS  # noqa: E402
from hllm_torchrec.lifecycle.nightly import run_night  # noqa: E402
from hllm_torchrec.training.trainer_setup import build_trainer  # noqa: E402

NIGHTS = 3
TRAINING: dict[str, Any] = {
    "data": {"item_features": ["genres"], "user_features": ["country"], "max_history": 64, "batch_users": 32},
    "item_llm": {"enabled": False},
    "user": {"encoder": "sasrec", "shape": {"width": 32, "layers": 1, "heads": 2, "max_positions": 64}},
    "features": {"time_depth": 0, "shard_from_rows": 64},
    "objective": {"fusion": "early", "head_hidden": 32},
    "max_steps": 5,
}


def night(folder: Path, history: int, pages: int, device: Any) -> dict[str, float]:
    """CPU seconds of each step by timed night, and the number of events before the middle one.

    The dataset is prepared from `history` + 1 days of `pages` pages.
    """
    sizes = {"first_users": pages, "daily_users": 0, "daily_items": 4, "active": pages}
    days = list(shop.days(shop.Shop(days=history + 2 + NIGHTS, **sizes)))
    for day in days:
        shop.write_day(day, folder)
    names = [f"day-{day.number:02d}" for day in days[-1 - NIGHTS :]]
    for name in names:
        shop.write_mapping(folder, name, f"{name}.csv")
        for kind in ("events", "items", "users"):
            (folder / kind / f"{name}.csv").rename(folder / kind / f"new-{name}.csv")
        shop.write_mapping(folder, name, f"new-{name}.csv")
    last = days[-2 - NIGHTS].start
    split = Split("date", train_until=last + shop.DAY // 2, valid_until=last + 3 * shop.DAY // 4)
    prepare(table(shop.write_mapping(folder, "first", "day-*.csv")), folder / "data", split=split)
    (folder / "train.yaml").write_text(yaml.safe_dump(TRAINING))
    options = ["--config", str(folder / "train.yaml"), "--data.dataset", str(folder / "data")]
    build_trainer(load_config([*options, "--output", str(folder / "first")]), device).run()
    config = NightConfig(
        folder=str(folder / "nights"),
        dataset=str(folder / "data"),
        append=AppendConfig(path=str(folder / "{night}.yaml")),
        training=str(folder / "train.yaml"),
        increment={"max_steps": 0},
        start_from=str(folder / "first"),
        gate=GateConfig(max_drop=1.0),
    )
    run_night(config, names[0], device, report=lambda _: None)  # a warm-up
    seconds: dict[str, list[float]] = {step: [] for step in STEPS}
    for name in names[1:]:
        for step in STEPS:
            started = time.process_time()
            run_night(config, name, device, [step], report=lambda _: None)
            seconds[step].append(time.process_time() - started)
    events = sum(len(day.events) for day in days[: -NIGHTS // 2])
    return {"events": events, **seconds}


def main() -> None:
    """Measure, print and write."""
    options = arguments(__doc__).parse_args()
    histories, pages = ((9, 90, 270), 2000) if not options.quick else ((9, 90), 2000)
    if options.tiny:
        histories, pages = (2, 4), 60
    found = []
    with distributed_device() as device:
        for history in histories:
            with tempfile.TemporaryDirectory(prefix="hllm-nights-") as folder:
                found.append(night(Path(folder), history, pages, device))
                say(str(found[-1]))
    ratios: dict[str, float] = {}
    for name, steps in (("night", STEPS), ("day", [step for step in STEPS if step != "embed"])):
        spent = [[sum(night) for night in zip(*(one[step] for step in steps), strict=True)] for one in found]
        for one, nights in zip(found, spent, strict=True):
            ratios[f"{name}_{one['events']:.0f}"] = ratio(nights, spent[0])
    shapes = {"pages": pages, "histories": list(histories)}
    report("nights", options, {"ratios": ratios, "shapes": shapes, "seconds": found})


if __name__ == "__main__":
    main()
