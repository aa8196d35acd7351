"""`hllm downstream`: trains the DLRM on IDs only and with stored item and user vectors; scores the same exposures.

It runs as a single process, or as ranks: torchrun --nproc_per_node 2 -m hllm_torchrec.launch.downstream --config ...
The defaults in configs/baselines/dlrm.yaml are overridden by --config and by options such as
--user_stores '[stores/users/nearline]' or --dlrm.lr 0.002; `--print_config` prints all settings and exits.
"""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hllm_torchrec import configs
from hllm_torchrec.launch.baselines import print_tables, say_done
from hllm_torchrec.launch.entry import run_job

if TYPE_CHECKING:
    from hllm_torchrec.downstream.dlrm_config import DownstreamConfig

PROG = "hllm downstream"


def load_settings(arguments: list[str]) -> "DownstreamConfig":
    """Load the packaged settings of the DLRM, overridden by `arguments`.

    Raises:
        ConfigError: unknown keys or options, wrong types, values out of range.
    """
    from hllm_torchrec.config.loading import load_dataclass
    from hllm_torchrec.downstream.dlrm_config import DownstreamConfig

    tuned = Path(configs.__file__).parent / "baselines" / "dlrm.yaml"
    return load_dataclass(DownstreamConfig, [f"--config={tuned}", *arguments], prog=PROG, description=str(__doc__))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 after the message of a user error."""
    return run_job(PROG, lambda: run(sys.argv[1:] if argv is None else argv))


def run(arguments: list[str]) -> None:
    """Train and score every row, and print their metrics.

    Raises:
        ValueError: settings, stores or dataset are not usable.
    """
    settings = load_settings(arguments)
    from hllm_torchrec.data.dataset import Dataset
    from hllm_torchrec.distributed.coordination import run_on_rank_zero
    from hllm_torchrec.distributed.process_group import distributed_device
    from hllm_torchrec.downstream.comparison import check_stores, run_row
    from hllm_torchrec.downstream.dlrm_config import IDS_ONLY

    rows = settings.rows or tuple(settings.possible_rows())
    dataset, output = Dataset.open(settings.dataset), Path(settings.output)
    check_stores(settings, dataset)
    with distributed_device() as device:
        for row in rows:
            is_new = run_row(settings, row, dataset, device)
            run_on_rank_zero(partial(say_done, output / row, is_new))
        print_tables(output, sorted(rows, key=lambda row: row != IDS_ONLY))  # the first is the reference


if __name__ == "__main__":
    sys.exit(main())
