"""Machine and process information for logs: processor, packages, commit, peak memory."""

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

LARGE_BUFFERS_KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
"""Environment variables that make glibc reuse large buffers. By default glibc returns them to the system, so that every
training step allocates them again; the resulting page faults take a third of the step."""

_PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "transformers", "numpy", "pyarrow")


def machine_info() -> dict[str, Any]:
    """Return the hardware and software of this process for the log and metrics of a run, as JSON values.

    Returns:
        cpu (model name), cores (that this process may use), memory_bytes, gpus (names), python, system,
        packages (installed: name -> version), hllm_torchrec (version), commit (of the checkout, or None).
    """
    import hllm_torchrec

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "hllm_torchrec": hllm_torchrec.__version__,
        "commit": _commit(Path(__file__).resolve().parents[2]),
    }


def _cpu_model() -> str:
    """Return the processor's name, from /proc/cpuinfo if it exists."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    """Return an installed package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> str | None:
    """Return the commit checked out at `root`; None if `root` is not a checkout, or if git is not installed."""
    if not (root / ".git").exists():  # git would otherwise search the parent directories
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


def peak_memory_bytes() -> dict[str, int]:
    """Return the peak memory of this process in bytes: `host` (resident) and, if used, `cuda` (allocated by torch)."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak
