"""The FAISS index of a run's items agrees with the exact evaluation."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hllm_torchrec.data.new_item_journal import JOURNAL, NewItem, NewItemJournal
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.catalogue_retrieval import catalogue_shard
from hllm_torchrec.evaluation.run_loader import load_run
from hllm_torchrec.evaluation.scoring import rank_catalogue_targets
from hllm_torchrec.inference.item_index import ItemIndex
from hllm_torchrec.launch.index import main
from tests.evaluation.test_catalogue_retrieval import config
from tests.helpers import fixtures
from tests.helpers.training_fixtures import train


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def vectors(number: int, seed: int = 0, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(number, width)).astype(np.float32)


def cosines(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    return (users / np.linalg.norm(users, axis=1)[:, None]) @ (items / np.linalg.norm(items, axis=1)[:, None]).T


@pytest.mark.parametrize("k", [1, 7, 60])
def test_the_best_items_are_those_of_a_sort_without_the_excluded(k: int) -> None:
    items, users = vectors(50), 3 * vectors(5, 1)
    ids = [f"i{number}" for number in range(50)]
    exclude = [[], ["i3", "nowhere"], ids[:20], ids[1:], ids]
    found, scores = ItemIndex.build(items, ids).search(users, k, exclude)
    expected = cosines(users, items)
    for row, banned in enumerate(exclude):
        order = [ids[i] for i in np.argsort(-expected[row]) if ids[i] not in banned][:k]
        assert found[row] == order
        np.testing.assert_allclose(
            scores[row, : len(order)], sorted(expected[row][[int(i[1:]) for i in order]])[::-1], atol=1e-5
        )
        assert (scores[row, len(order) :] == -np.inf).all()


def test_an_ivf_index_that_searches_all_cells_is_exact_and_one_cell_holds_some(tmp_path: Path) -> None:
    items, users = vectors(300), vectors(8, 1)
    flat, ivf = (ItemIndex.build(items, range(300), kind) for kind in ("flat", "ivf"))  # type: ignore[arg-type]
    ivf.save(tmp_path / "ivf")
    ivf = ItemIndex.open(tmp_path / "ivf")
    expected, _ = flat.search(users, 20)
    assert ivf.index.nlist == 69 and ivf.search(users, 20, nprobe=69)[0] == expected
    few, scores = ivf.search(users, 300, nprobe=1)
    assert all(0 < len(ids) < 300 for ids in few) and np.isfinite(scores).sum() == sum(map(len, few))


@pytest.mark.slow
def test_the_index_of_a_run_ranks_targets_as_the_evaluation_does(tmp_path: Path) -> None:
    train(config(tmp_path / "run", max_steps=2))
    assert main(["--run", str(tmp_path / "run"), "--output", str(tmp_path / "index")]) == 0
    index = ItemIndex.open(tmp_path / "index")
    assert len(index) == fixtures.ITEMS
    loaded = load_run(tmp_path / "run", "best", init_distributed())
    experiment = loaded.experiment
    loader, raw = experiment.loader("test", 4), experiment.dataset.items["raw_item_id"].to_pylist()
    columns, _ = rank_catalogue_targets(
        experiment.model, loader, catalogue_shard(experiment), experiment.device, positive_only=False
    )
    by_target = dict(zip(zip(columns["user_id"], columns["position"]), columns["rank"]))
    experiment.hllm.eval()
    for batch in loader.batches(0):
        with torch.no_grad():
            predicted = experiment.model(batch, want_next=True).next_items.numpy()
        owner = torch.repeat_interleave(batch.query_offsets.diff())[batch.target_query].tolist()
        for number, user in enumerate(owner):
            key = (int(batch.user_ids[user]), int(batch.positions[number]))
            if key not in by_target:
                continue  # no history
            start, visible = int(batch.seq_offsets[user]), int(batch.query_visible[batch.target_query[number]])
            history = batch.item_ids[start : start + visible].tolist()
            target = int(batch.target_items[number])
            seen = [raw[i - 1] for i in history if i != target]
            (ids,), _ = index.search(predicted[number : number + 1], fixtures.ITEMS, [seen])
            assert 1 + ids.index(raw[target - 1]) == by_target.pop(key)
    assert not by_target
    destroy_distributed()
    journal = NewItemJournal(experiment.dataset.root / JOURNAL)
    journal.append([NewItem("n1", {"title": "word1"})])
    try:
        assert main(["--run", str(tmp_path / "run"), "--output", str(tmp_path / "later")]) == 0
    finally:
        journal.path.unlink()
    later = ItemIndex.open(tmp_path / "later")
    assert later.ids.to_pylist() == [*raw, "n1"] and len(later) == len(raw) + 1


def test_a_saved_index_opens_and_is_not_overwritten(tmp_path: Path) -> None:
    built = ItemIndex.build(vectors(3), ["a", "b", "c"])
    built.save(tmp_path / "index")
    assert ItemIndex.open(tmp_path / "index").search(vectors(1), 1)[0] == [["a"]]
    with pytest.raises(ValueError, match="index: already exists: choose another folder"):
        built.save(tmp_path / "index")


def test_wrong_requests_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = ItemIndex.build(vectors(4), [1, 2, 3, 4])
    with pytest.raises(ValueError, match="k is 0: must be at least 1"):
        index.search(vectors(1), 0)
    with pytest.raises(ValueError, match=r"users: shape \(1, 5\): must be \[B, 6\], the width of the items"):
        index.search(vectors(1, width=5), 1)
    with pytest.raises(ValueError, match="exclude: 2 lists for 1 users: give one to each"):
        index.search(vectors(1), 1, [[], []])
    with pytest.raises(ValueError, match="3 ids for 4 vectors: give one to each"):
        ItemIndex.build(vectors(4), [1, 2, 3])
    with pytest.raises(ValueError, match="cells is 5: must be 1 to 4, the number of items"):
        ItemIndex.build(vectors(4), [1, 2, 3, 4], "ivf", 5)
    with pytest.raises(ValueError, match="no index.faiss: write one with `hllm index`"):
        ItemIndex.open(tmp_path)
    assert main(["--run", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "already exists: choose another folder, or remove it" in capsys.readouterr().err


def test_a_model_without_a_generative_loss_has_no_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranking = {"objective__fusion": "early", "evaluation__protocol": None}
    train(config(tmp_path / "run", max_steps=1, **ranking))
    assert main(["--run", str(tmp_path / "run"), "--output", str(tmp_path / "index")]) == 2
    assert "users and items share no space; train with a generative loss" in capsys.readouterr().err
