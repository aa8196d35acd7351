"""The last thing that the server of forked processes imports: what it has now, each of them has.

The machine's peak is measured once instead of by every rank of every run, and what was imported is taken out of the
garbage collector's sight: it would walk a million objects again and again.

As in conftest.py, nothing waits for the disk.
"""

import contextlib
import gc
import os
import sys

os.fsync = os.fstat  # type: ignore[assignment]

if "hllm_torchrec.training.throughput" in sys.modules:
    import torch

    from hllm_torchrec.training.throughput import global_matmul_peak

    global_matmul_peak(torch.device("cpu"), torch.float32)

if "hllm_torchrec.config.loading" in sys.modules:
    from hllm_torchrec.common.errors import ConfigError
    from hllm_torchrec.config.loading import load_config

    with contextlib.suppress(ConfigError):
        load_config([])  # builds the parser

gc.collect()
gc.freeze()
