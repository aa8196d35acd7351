"""Script form of `hllm train`, for `torchx run dist.ddp -j 4x8 train.py --config ...`."""

import sys
from pathlib import Path

from hllm_torchrec.launch.train import main

if __name__ == "__main__":
    args = sys.argv[1:]
    # TorchX reads the script's name from .torchxconfig, and passes the `train.py` of the command line to this program
    # as its first argument.
    sys.exit(main(args[1:] if args and Path(args[0]).name == Path(__file__).name else args))
