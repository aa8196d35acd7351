"""The table of retrieval models from the ranks that runs write."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hllm_torchrec.evaluation.retrieval_comparison import (
    compare_models,
    gains,
    markdown,
    markdown_of_differences,
    read_target_ranks,
)

USERS = np.repeat(np.arange(60), 2)


def write(directory: Path, rank: np.ndarray, users: np.ndarray = USERS) -> Path:
    """Two parts, the second user's first."""
    directory.mkdir(parents=True)
    position = np.arange(len(users))
    for part, rows in enumerate((slice(5, None), slice(0, 5))):
        table = {"user_id": users[rows], "position": position[rows], "item_id": position[rows], "rank": rank[rows]}
        pq.write_table(pa.table(table), directory / f"part-{part:05d}.parquet")
    return directory


def test_figures_are_means_over_seeds_and_intervals_resample_users(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ranks = {f"{name}{seed}": rng.integers(1, top, 120) for name, top in (("a", 40), ("b", 20)) for seed in (0, 1)}
    paths = {name: write(tmp_path / name, rank) for name, rank in ranks.items()}
    found = compare_models({"a": [paths["a0"], paths["a1"]], "b": [paths["b0"]]}, ["recall@10", "ndcg@10"])
    both = np.stack([ranks["a0"], ranks["a1"]])
    value = found["a"]["value"]["recall@10"]
    assert value.mean == pytest.approx((both <= 10).mean())
    assert value.deviation == pytest.approx((both <= 10).mean(1).std(ddof=1))
    per_user = (both <= 10).mean(0).reshape(60, 2).mean(1)
    half = 1.96 * per_user.std() / math.sqrt(60)
    assert value.low == pytest.approx(value.mean - half, abs=0.02)
    assert value.high == pytest.approx(value.mean + half, abs=0.02)
    difference = found["b"]["difference"]["ndcg@10"]
    expected = gains(ranks["b0"], "ndcg@10").mean() - np.mean([gains(r, "ndcg@10").mean() for r in both])
    assert difference.mean == pytest.approx(expected) and difference.low > 0 and difference.deviation is None
    assert found["a"]["difference"] == {}
    row = markdown_of_differences({"a": found}, "ndcg@10").splitlines()
    assert row[2] == "| a |  |" and row[3].startswith(f"| b | {difference.mean:+.4f} [{difference.low:+.4f}, ")
    assert markdown(found).splitlines()[2].startswith(f"| a | {value.mean:.4f} [{value.low:.4f}, ")


def test_gains_are_those_of_the_metrics() -> None:
    rank = np.array([1, 3, 10, 11])
    assert gains(rank, "recall@10").tolist() == [1, 1, 1, 0]
    np.testing.assert_allclose(gains(rank, "ndcg@10"), [1, 0.5, 1 / math.log2(11), 0])
    with pytest.raises(ValueError, match="metric 'mrr': must be recall@K or ndcg@K"):
        gains(rank, "mrr")


def test_what_cannot_be_compared_is_an_error(tmp_path: Path) -> None:
    one = write(tmp_path / "one", np.ones(120, np.int64))
    other = write(tmp_path / "other", np.ones(120, np.int64), USERS + 1)
    with pytest.raises(ValueError, match="other: its targets differ from .*one's: evaluate both on the same part"):
        compare_models({"one": [one], "other": [other]}, ["recall@1"])
    with pytest.raises(ValueError, match=r"no part-\*.parquet"):
        read_target_ranks(tmp_path)
    pq.write_table(pq.read_table(one / "part-00000.parquet"), one / "part-00009.parquet")
    with pytest.raises(ValueError, match="a target occurs twice"):
        read_target_ranks(one)


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "part-00000.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=rf"{tmp_path} cannot be read .*; remove it and evaluate again"):
        read_target_ranks(tmp_path)
