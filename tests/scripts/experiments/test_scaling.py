"""The scaling study: its law is found again in points made by it, and its grids are configurations that load."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hllm_torchrec.config.loading import load_config
from tests.helpers.scripts import bench_module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return bench_module("scaling")


def points(script: ModuleType, noise: float = 0.0) -> list[Any]:
    """A grid whose losses follow E = 4, A = .5, a = .3, B = .8, b = .4."""
    rng = np.random.default_rng(0)
    found = []
    for n in (5e3, 2e4, 8e4, 3e5):
        for d in (1e4, 2e4, 4e4, 8e4):
            loss = 4 + 0.5 * (n / 1e4) ** -0.3 + 0.8 * (d / 1e4) ** -0.4 + noise * rng.normal()
            found.append(script.Point(0, 16, 1.0, 0, 0, int(n), int(d), loss, 0.1, 10, 1e12, 60.0))
    return found


@pytest.fixture(scope="module")
def law(script: ModuleType) -> dict[str, Any]:
    """Fitted to points without noise."""
    fitted: dict[str, Any] = script.fit(points(script))
    return fitted


def test_the_law_is_found_again(law: dict[str, Any]) -> None:
    found = law
    assert found["parameters"] == pytest.approx({"E": 4, "A": 0.5, "a": 0.3, "B": 0.8, "b": 0.4}, rel=1e-3)
    assert found["explained"] > 0.999999 and found["largest_residual"] < 1e-5


@pytest.mark.slow
def test_noise_shows_in_the_errors(script: ModuleType, law: dict[str, Any]) -> None:
    still, noisy = law, script.fit(points(script, noise=0.02))
    assert noisy["jackknife_errors"]["b"] > 100 * still["jackknife_errors"]["b"]
    assert noisy["largest_residual"] < 0.06


@pytest.mark.slow
def test_the_grids_are_configurations_and_every_point_has_as_many_steps(script: ModuleType) -> None:
    found = script.variants(epochs=4)
    assert len({variant.name for variant in found}) == len(found) == 16 + 8
    for variant in found:
        config = load_config(["--config", str(script.CONFIGS / f"{variant.config}.yaml"), *variant.options])
        assert config.data.train_users == variant.share
        assert config.user.shape["hidden_size"] == variant.width
        assert (config.item_llm.layers if config.item_llm.enabled else 0) == variant.layers
        assert config.stages[-1].epochs * variant.share == pytest.approx(4)
        assert config.evaluation.every * script.EVALUATIONS == pytest.approx(config.stages[-1].epochs)


def test_the_plot_and_the_table_have_every_point(script: ModuleType, law: dict[str, Any], tmp_path: Path) -> None:
    grid = [*points(script), script.Point(2, 16, 1.0, 0, 500, 100, 100, 4.5, 0.1, 10, 1e12, 60.0)]
    script.plot(grid, law, tmp_path / "scaling.svg")
    assert (tmp_path / "scaling.svg").stat().st_size > 10_000
    assert script.markdown(grid).count("\n") == len(grid) + 1
