"""Checks for test_gpu_check.py, one for each way that a check can end."""

import os
import time
from typing import Any

from checking import Skipped, Where, check


@check(30)
def finds(where: Where) -> dict[str, Any]:
    """Finds something."""
    print("not to be seen")
    return {"tiny": where.tiny, "device": where.device.type}


@check(30)
def fails(where: Where) -> dict[str, Any]:
    """Does not find what it should."""
    print("said before")
    raise AssertionError("3 is not 4")


@check(30)
def has_no_business_here(where: Where) -> dict[str, Any]:
    """Needs something else."""
    raise Skipped("there is no such thing")


@check(1)
def hangs(where: Where) -> dict[str, Any]:
    """Takes too long."""
    time.sleep(60)
    return {}


@check(30)
def dies(where: Where) -> dict[str, Any]:
    """As after a fault in a driver."""
    os._exit(7)


@check(30)
def comes_after(where: Where) -> dict[str, Any]:
    """Runs in spite of those before."""
    return {"fine": True}
