"""A few of the soak script's kills; fifty are its own."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_ranks_killed_at_random_moments_lose_nothing(root: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("soak", root / "scripts" / "soak.py")
    assert spec is not None and spec.loader is not None
    soak = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = soak  # dataclasses look their module up
    spec.loader.exec_module(soak)
    words = "--launcher fork --kills 5 --steps 40 --asynchronous --seed 1".split()
    found = soak.soak(tmp_path, soak.parse(words))
    assert found["kills"]["injected"] == found["recovered"] == 5
    assert found["lost"] == 0 and found["exit_status"] == 0
