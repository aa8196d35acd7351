"""Settings of every test run: one thread a process, no network, the same examples each time."""

import gc
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or each process that compiles starts several more
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would download fails instead
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # or each process of the tests compiles all that it imports
    sys.dont_write_bytecode = False

# A shell lets the jobs that it runs in the background ignore SIGINT, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A killed process loses nothing that it wrote: only a machine does, which no test can switch off. What is synced, and
# when, is tested by the calls; a call that waits for the disk would take most of the time of a commit or a checkpoint.
os.fsync = os.fstat  # type: ignore[assignment]

gc.disable()  # while the tests are imported, see pytest_collection_finish
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("long", derandomize=False, deadline=None, max_examples=2000, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


BESIDE = {"threading", "subprocess", "multiprocessing", "concurrent.futures", "filelock"}
BESIDE |= {f"tests.helpers.{name}" for name in ("distributed", "jobs", "processes", "schedules")}
"""Modules by which a test starts processes or threads, or holds locks."""


TRAINERS = {("tests.helpers.training_fixtures", name) for name in ("train", "on_rank", "each_on_rank")}
TRAINERS |= {("tests.helpers.served_runs", "trained"), ("hllm_torchrec.launch.train", "main")}
TRAINERS |= {("hllm_torchrec.training.trainer_setup", "build_trainer")}
TRAINERS |= {("tests.helpers.title_fixtures", name) for name in ("world", "copied")}
"""Functions that train a run: most of a second, of which the suite has a thousand."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark `processes` the tests that use something of `BESIDE`, and `slow` those that train, unless marked `quick`.

    They do so themselves, by a fixture or by a function of their module.
    """
    found: dict[ModuleType, tuple[set[str], set[str]]] = {}
    for item in items:
        module = getattr(item, "module", None)
        if isinstance(item, pytest.Function) and isinstance(module, ModuleType):
            if module not in found:
                found[module] = _users_of(module, _is_beside), _users_of(module, _trains)
            used = {item.function.__name__, *item.fixturenames}
            for mark, users in zip(("processes", "slow"), found[module], strict=True):
                if users & used and not (mark == "slow" and item.get_closest_marker("quick")):
                    item.add_marker(mark)


def _is_beside(name: str, value: object) -> bool:
    origin = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or name
    return origin in BESIDE


def _trains(name: str, value: object) -> bool:
    return (getattr(value, "__module__", ""), getattr(value, "__name__", "")) in TRAINERS


def _users_of(module: ModuleType, is_used: Callable[[str, object], bool]) -> set[str]:
    """Names of the module's functions and fixtures that use something for which `is_used`, directly or not."""
    users = {name for name, value in vars(module).items() if is_used(name, value)}
    functions = {name: inspect.unwrap(value) for name, value in vars(module).items() if callable(value)}
    # pytest keeps the function of a fixture in the object that it puts in its place.
    functions = {name: getattr(value, "_fixture_function", value) for name, value in functions.items()}
    codes = {name: value.__code__ for name, value in functions.items() if isinstance(value, FunctionType)}
    used = {name: _names(code) for name, code in codes.items()}
    while more := {name for name, names in used.items() if name not in users and names & users}:
        users |= more
    return users


def _names(code: CodeType) -> set[str]:
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    return set(code.co_names).union(code.co_varnames[: code.co_argcount], *map(_names, inner))


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
