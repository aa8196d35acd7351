"""Experiments on tasks: their arms are configurations, and the order of pages is compared by user."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hllm_torchrec.config.loading import load_config
from tests.helpers.scripts import bench_module


def test_every_arm_is_a_configuration_of_its_own(root: Path) -> None:
    tasks, ordinal = bench_module("tasks"), bench_module("ordinal")
    same = {"rate_25_raw", "rate_5_raw", "rate_5_file", *tasks.LONGER}  # what differs is not in the configuration
    found = []
    for arm in (arm for arm in tasks.ARMS if arm not in same):
        settings = tasks._flat(tasks.COMMON) | tasks.ARMS[arm]
        options = [f"--{name}={one if isinstance(one, str) else json.dumps(one)}" for name, one in settings.items()]
        found.append(repr(load_config(options)))
    config = ["--config", str(root / "configs" / "ml100k" / "no_text.yaml")]
    found += [repr(load_config([*config, *options])) for options in ordinal.ARMS.values()]
    assert len(set(found)) == len(found) == len(tasks.ARMS) - len(same) + len(ordinal.ARMS)


def test_the_error_of_the_order_has_users_as_units() -> None:
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(50), 8)
    pages = rng.normal(size=50)[users] + 0.1 * rng.normal(size=400)
    series = pd.Series(pages, index=pd.MultiIndex.from_arrays([users, np.arange(400)]))
    found = bench_module("tasks").mean_over_users(series)
    means = pages.reshape(50, 8).mean(1)
    assert found["mean"] == pytest.approx(pages.mean())
    assert found["error"] == pytest.approx(means.std() / np.sqrt(50))
    assert found["error"] > 2 * pages.std() / np.sqrt(400)
