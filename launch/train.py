"""Train: `train.py --config configs/quickstart.yaml [--field.name value ...]`, on one process or under torchrun."""

import sys

from hllm_torchrec.config import load_config
from hllm_torchrec.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Run one configuration; returns the exit status (2: the user's configuration or data is wrong)."""
    try:
        config = load_config(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        print(f"train: error: {error}", file=sys.stderr)
        return 2
    from hllm_torchrec.parallelize import start_process, stop_process
    from hllm_torchrec.trainer import Trainer

    device = start_process()
    try:
        Trainer(config, device).run()
    except ValueError as error:
        print(f"train: error: {error}", file=sys.stderr)
        return 2
    finally:
        stop_process()
    return 0


if __name__ == "__main__":
    sys.exit(main())
