"""A few of the soak script's kills; fifty are its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_ranks_killed_at_random_moments_lose_nothing(root: Path, tmp_path: Path) -> None:
    words = "--launcher fork --kills 3 --steps 24 --asynchronous --seed 1".split()
    script, out = root / "scripts" / "soak.py", tmp_path / "soak.json"
    result = subprocess.run([sys.executable, str(script), *words, "--out", str(out)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(out.read_text())
    assert found["kills"]["injected"] == found["recovered"] > 0
    assert found["lost"] == 0 and found["exit_status"] == 0
