"""The embedding job for users: what the model says, only who did something new, on any number of ranks."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.run_loader import LoadedRun, load_run
from hllm_torchrec.inference import item_embedding
from hllm_torchrec.inference.user_embedder import nightly_request, open_embedder
from hllm_torchrec.inference.user_embedding import UserReport, embed_users, user_content_hashes
from hllm_torchrec.launch.embed import main
from hllm_torchrec.store import EmbeddingStore
from tests.helpers import fixtures
from tests.helpers.distributed import run_ranks
from tests.helpers.training_fixtures import config, train

STAGE = {"stages": [{"name": "first", "epochs": 0.5}], "evaluation__batch_users": 24}
RAW_IDS = fixtures.dataset().users["raw_user_id"].to_pylist()


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("users") / "run"
    train(config(folder, data__history="all", features__init_scale=0.5, **STAGE))
    destroy_distributed()
    return folder


def load(run_dir: Path) -> LoadedRun:
    return load_run(run_dir, "best", init_distributed())


def whole_histories() -> dict[str, fixtures.Piece]:
    """Every user's longest sequence, by raw id."""
    found = {}
    for part in ("train", "valid", "test"):
        found |= {RAW_IDS[piece.user_id - 1]: piece for piece in fixtures.pieces(part)}
    return found


def test_every_user_has_the_vector_of_the_whole_history(run_dir: Path, tmp_path: Path) -> None:
    loaded = load(run_dir)
    report = embed_users(loaded, tmp_path / "s", dtype="fp32")
    assert (report.users, report.active, report.encoded) == (len(RAW_IDS),) * 3
    found, known = EmbeddingStore.open(tmp_path / "s").snapshot().gather(RAW_IDS)
    assert known.all() and found.std(0).max() > 1e-3
    with open_embedder(loaded.experiment) as embedder:
        for row, raw in enumerate(RAW_IDS):
            piece = whole_histories()[raw]
            limit = loaded.experiment.config.data.max_history
            vectors, _ = embedder([nightly_request(piece, piece.item_ids.size, limit)])
            torch.testing.assert_close(found[row], vectors[0], atol=1e-5, rtol=0)


def test_a_history_on_the_last_day_of_the_time_tables_is_embedded(run_dir: Path) -> None:
    piece = fixtures.pieces("train")[1]
    end = datetime(2099, 12, 31, 23, 59, 59, tzinfo=UTC)
    moved = replace(piece, timestamps=piece.timestamps - piece.timestamps[-1] + int(end.timestamp()))
    with open_embedder(load(run_dir).experiment) as embedder:
        vectors, known = embedder([nightly_request(moved, len(moved), 64)])
        earlier, _ = embedder([nightly_request(moved, len(moved) - 1, 64)])
    assert known.all() and vectors.isfinite().all() and not torch.equal(vectors, earlier), "the last second is read"


def test_only_users_with_something_new_since_the_date_are_embedded(run_dir: Path, tmp_path: Path) -> None:
    loaded = load(run_dir)
    last = {raw: int(piece.timestamps[-1]) for raw, piece in whole_histories().items()}
    since = sorted(last.values())[len(last) // 2]
    active = [raw for raw in RAW_IDS if last[raw] >= since]
    report = embed_users(loaded, tmp_path / "s", since=since)
    assert report.active == report.encoded == len(active) < report.users
    store = EmbeddingStore.open(tmp_path / "s")
    _, known = store.snapshot().gather(RAW_IDS)
    assert known.tolist() == [raw in active for raw in RAW_IDS]
    assert embed_users(loaded, tmp_path / "s", since=since).encoded == 0
    with store.writer() as writer:  # as if two of them had had fewer events when they were embedded
        writer.upsert(active[:2], torch.zeros(2, store.width), np.array([1, 2], np.uint64))
        writer.commit()
    again = embed_users(loaded, tmp_path / "s", since=since)
    assert (again.encoded, again.active) == (2, len(active))
    assert embed_users(loaded, tmp_path / "s").encoded == len(RAW_IDS) - len(active)


def test_a_mark_follows_the_last_second_and_the_number_of_events() -> None:
    marks = user_content_hashes(np.array([5, 5, 6, 5]), np.array([2, 3, 2, 2]))
    assert marks[0] == marks[3] and np.unique(marks).size == 3


def embed_on_ranks(run_dir: Path, store: Path) -> UserReport:
    item_embedding.CATALOGUE_TOKENS, item_embedding.COMMIT_TOKENS = 60, 200
    return embed_users(load(run_dir), store, dtype="fp32")


@pytest.mark.slow
def test_two_ranks_in_many_commits_write_what_one_does_in_one(run_dir: Path, tmp_path: Path) -> None:
    embed_users(load(run_dir), tmp_path / "one", dtype="fp32")
    destroy_distributed()
    reports = run_ranks(embed_on_ranks, 2, run_dir, tmp_path / "two")
    assert reports[0].encoded == len(RAW_IDS) and reports[0].version == reports[1].version > 1
    one, two = (EmbeddingStore.open(tmp_path / name).snapshot().gather(RAW_IDS) for name in ("one", "two"))
    assert two[1].all()
    torch.testing.assert_close(two[0], one[0], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_users_without_a_history_by_the_configuration_have_no_vector(tmp_path: Path) -> None:
    train(config(tmp_path / "run", data__history="positive", **STAGE))
    embed_users(load(tmp_path / "run"), tmp_path / "s")
    _, known = EmbeddingStore.open(tmp_path / "s").snapshot().gather(RAW_IDS)
    positives = {raw: bool((piece.labels == 1).any()) for raw, piece in whole_histories().items()}
    assert known.tolist() == [positives[raw] for raw in RAW_IDS]


@pytest.mark.slow
def test_the_command_embeds_items_and_users_and_refuses_another_checkpoint(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stores = ["--items", str(tmp_path / "items"), "--users", str(tmp_path / "users")]
    assert main(["--run", str(run_dir), *stores, "--since", "2014-01-01"]) == 0
    said = capsys.readouterr().out
    assert f"embedded {len(RAW_IDS)} of {len(RAW_IDS)} active users ({len(RAW_IDS)} in all) in " in said
    assert f"{tmp_path / 'items'} is at version 1" in said and f"{tmp_path / 'users'} is at version" in said
    own = load(run_dir)
    embed_users(own, tmp_path / "own", dtype="fp32")  # from live items; the stored ones are of half precision
    two = [EmbeddingStore.open(tmp_path / name).snapshot().gather(RAW_IDS)[0] for name in ("users", "own")]
    torch.testing.assert_close(*two, atol=2e-2, rtol=0)
    destroy_distributed()
    assert main(["--run", str(run_dir), "--users", str(tmp_path / "numbers"), "--keys", "int64"]) == 2
    assert "keys int64: raw id 'u0' is not an int64 in its usual decimal form" in capsys.readouterr().err
    assert not (tmp_path / "numbers").exists()
    destroy_distributed()
    train(config(tmp_path / "other", seed=1, **STAGE))
    destroy_distributed()
    assert main(["--run", str(tmp_path / "other"), "--users", str(tmp_path / "users")]) == 2
    assert "made by another model (weights differ)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [([], "name a store: --items, --users or both"), (["--users", "x", "--since", "soon"], "'soon' is not a date")],
)
def test_mistakes_on_the_command_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["--run", "nowhere", *options])
    except SystemExit as error:  # argparse's own
        status = error.code
    assert status == 2 and message in capsys.readouterr().err
