"""Settings of every test run: one thread a process, no network, the same examples each time."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or each process that compiles starts several more
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would download fails instead
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # or each process of the tests compiles all that it imports
    sys.dont_write_bytecode = False

gc.disable()  # while the tests are imported, see pytest_collection_finish
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("long", derandomize=False, deadline=None, max_examples=2000, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_finish() -> None:
    """What all the tests import is there: the garbage collector need not walk its million objects again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _own_process_group() -> Iterator[None]:
    """A process group that a test joined ends with it: the next test may want another kind."""
    yield
    distributed = sys.modules.get("torch.distributed")  # not imported for the tests that do without torch
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
