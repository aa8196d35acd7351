"""The last thing that the server of forked processes imports: what it has now, each of them has.

The machine's peak is measured once instead of by every rank of every run, and what was imported is taken out of the
garbage collector's sight: it would walk a million objects again and again.
"""

import gc
import sys

if "hllm_torchrec.training.throughput" in sys.modules:
    import torch

    from hllm_torchrec.training.throughput import global_matmul_peak

    global_matmul_peak(torch.device("cpu"), torch.float32)

gc.collect()
gc.freeze()
