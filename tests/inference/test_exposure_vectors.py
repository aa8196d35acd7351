"""User vectors of exposures: made from what came before alone, by day or by second, the same on any number of ranks."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hllm_torchrec.data.events import Events, Piece
from hllm_torchrec.distributed.collectives import global_sum
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.inference import item_embedding
from hllm_torchrec.inference.exposure_vectors import (
    REQUESTS_BY_MODE,
    Coverage,
    ExposureVectors,
    Mode,
    embed_requests,
    exposure_vectors,
)
from hllm_torchrec.inference.user_embedder import DAY, UserEmbedder, open_embedder
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.models.experiment import Experiment
from tests.helpers import fixtures
from tests.helpers.distributed import run_ranks
from tests.helpers.training_fixtures import config

LIMIT = 64
MODES: tuple[Mode, ...] = ("daily", "nearline")
Key = tuple[int, int]


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def build(tmp_path: Path, fusion: str = "late", **options: Any) -> Experiment:
    settings = {"objective__fusion": fusion, "data__max_history": LIMIT, "features__init_scale": 0.5, **options}
    experiment = build_experiment(config(tmp_path / "run", **settings), init_distributed())
    fixtures.enlarge(experiment.hllm.user)
    return experiment


def of_piece(embedder: UserEmbedder, piece: Piece, mode: Mode, delay: int = 0) -> dict[int, tuple[torch.Tensor, bool]]:
    """(vector, whether there is one) by the exposure's position."""
    found = embed_requests(embedder, list(REQUESTS_BY_MODE[mode](piece, LIMIT, delay)))
    return dict(zip(found.position.tolist(), zip(found.users, found.has_user.tolist(), strict=True), strict=True))


def perturbed(piece: Piece, where: np.ndarray) -> Piece:
    """Items, actions and labels of the events `where` are others, and those of the last come an hour later."""
    items, actions, labels, times = (x.copy() for x in (piece.item_ids, piece.actions, piece.labels, piece.timestamps))
    items[where] = items[where] % fixtures.ITEMS + 1
    actions[where] = (actions[where] + 2) % 6 + 1
    labels[where] = 1 - labels[where]
    last = where & (times == times[-1]) & (times != times[where].min())
    times[last] += 3600
    return dataclasses.replace(piece, item_ids=items, actions=actions, labels=labels, timestamps=times)


@pytest.mark.parametrize("mode", MODES)
def test_vectors_see_an_event_after_its_feedback_delay_only(mode: Mode, tmp_path: Path) -> None:
    unit, delay, checked = DAY if mode == "daily" else 1, 80_000, 0
    with open_embedder(build(tmp_path, data__feedback_delay=delay)) as embedder:
        for piece in fixtures.pieces()[:6]:
            before = of_piece(embedder, piece, mode, delay)
            for position in list(before)[::5]:
                young = piece.timestamps >= piece.timestamps[position] // unit * unit - delay
                vector, known = of_piece(embedder, perturbed(piece, young), mode, delay)[position]
                assert known == before[position][1] == bool((~young).any())
                torch.testing.assert_close(vector, before[position][0], atol=1e-5, rtol=0)
                checked += known
    assert checked > 5


@pytest.mark.parametrize("fusion", ["late", "early", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_earlier_never_changes_a_vector_and_what_is_does(mode: Mode, fusion: str, tmp_path: Path) -> None:
    unit = DAY if mode == "daily" else 1
    checked = moved = 0
    with open_embedder(build(tmp_path, fusion)) as embedder:
        for piece in fixtures.pieces()[:6]:
            before = of_piece(embedder, piece, mode)
            for position in list(before)[::5]:
                later = piece.timestamps // unit >= piece.timestamps[position] // unit
                vector, known = of_piece(embedder, perturbed(piece, later), mode)[position]
                assert known == before[position][1] == bool((~later).any())
                torch.testing.assert_close(vector, before[position][0], atol=1e-5, rtol=0)
                checked += 1
                if known:
                    earlier, _ = of_piece(embedder, perturbed(piece, ~later), mode)[position]
                    moved += not torch.allclose(earlier, vector, atol=1e-3)
                else:
                    assert not vector.any()
    assert checked > 10 and moved > 5


def test_a_daily_vector_is_that_of_a_user_whose_history_ends_the_day_before(tmp_path: Path) -> None:
    """The oracle cuts the history off by hand and asks at the midnight after its last event, one user at a time."""
    compared = 0
    with open_embedder(build(tmp_path)) as embedder:
        for piece in fixtures.pieces()[:8]:
            for position, (vector, known) in of_piece(embedder, piece, "daily").items():
                day = piece.timestamps[position] // DAY
                kept = [i for i, second in enumerate(piece.timestamps) if second // DAY < day]
                assert known == bool(kept)
                if not known or position % 3:
                    continue
                midnight = (piece.timestamps[kept[-1]] // DAY + 1) * DAY
                request = Events.at([midnight], item_ids=[7], labels=[1], actions=[3])
                read = Events.concat([piece[np.array(kept)], request])
                alone = Piece(**read.columns, user_id=piece.user_id, first_target=len(kept))
                torch.testing.assert_close(vector, embedder([alone])[0][0], atol=1e-5, rtol=0)
                compared += 1
    assert compared > 5


def test_a_nearline_vector_is_what_the_head_scores_with(tmp_path: Path) -> None:
    experiment = build(tmp_path)
    head, labels = experiment.hllm.head, 0
    with open_embedder(experiment) as embedder, torch.no_grad():
        for batch in experiment.loader("valid", 24).batches(0):
            logits = experiment.hllm(batch).logits
            users = experiment.hllm.embed_users(batch)[batch.target_query]
            slots = experiment.hllm._encode_users(batch, experiment.hllm.item_embeddings(batch.unique_items))
            torch.testing.assert_close(head(users, slots[2]), logits, atol=1e-5, rtol=0)
            labels += batch.labels.numel()
            keys = list(zip(batch.positions.tolist(), batch.target_query.tolist(), strict=True))
            assert keys and users.shape == (len(keys), embedder.width)
    assert labels


@pytest.mark.parametrize(("fusion", "width"), [("late", 24), ("early", 24), ("none", 16)])
def test_width_is_the_item_space_where_the_generative_loss_compares_there(
    fusion: str, width: int, tmp_path: Path
) -> None:
    experiment = build(tmp_path, fusion)
    with open_embedder(experiment) as embedder:
        assert embedder.width == width and embedder([])[0].shape == (0, width)
        piece = fixtures.pieces()[2]
        assert embedder([piece])[0].shape == (int((~np.isnan(piece.labels[piece.first_target :])).sum()), width)
    if fusion == "none":
        batch = next(experiment.loader("valid", 24).batches(0))
        expected = experiment.hllm(batch, want_next=True).next_items
        torch.testing.assert_close(experiment.hllm.embed_users(batch)[batch.target_query], expected)


def test_a_long_user_in_many_stretches_still_has_each_exposure_once(tmp_path: Path) -> None:
    longest = max(fixtures.pieces(), key=lambda piece: piece.item_ids.size)
    assert longest.item_ids.size > 30
    with open_embedder(build(tmp_path, data__max_history=8)) as embedder:
        for mode in MODES:
            units = list(REQUESTS_BY_MODE[mode](longest, 8, 0))
            assert all(unit.history is None or unit.history.item_ids.size <= 8 for unit in units)
            found = sorted(embed_requests(embedder, units).position.tolist())
            assert (
                found
                == (longest.first_target + np.flatnonzero(~np.isnan(longest.labels[longest.first_target :]))).tolist()
            )


def by_key(parts: list[ExposureVectors]) -> dict[Key, tuple[torch.Tensor, bool, float]]:
    return {
        (user, position): (vector, known, label)
        for part in parts
        for user, position, vector, known, label in zip(
            part.user_id.tolist(),
            part.position.tolist(),
            part.users,
            part.has_user.tolist(),
            part.label.tolist(),
            strict=True,
        )
    }


def of_split(tmp_path: Path, mode: Mode, dense: str = "ddp") -> tuple[dict[Key, Any], Coverage]:
    item_embedding.CATALOGUE_TOKENS = 40  # many small batches, not as many on every rank
    parts = list(exposure_vectors(build(tmp_path, parallel__dense=dense), "test", mode))
    counts = [sum(part.label.size for part in parts), sum(int(part.has_user.sum()) for part in parts)]
    return by_key(parts), Coverage(*map(int, global_sum(torch.tensor(counts)).tolist()))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_exposure_of_a_split_comes_once_on_one_rank_and_on_two(
    mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_embedding, "CATALOGUE_TOKENS", item_embedding.CATALOGUE_TOKENS)
    one, counted = of_split(tmp_path, mode)
    unit = DAY if mode == "daily" else 1
    wanted = {}
    for piece in fixtures.pieces("test"):
        for position in piece.first_target + np.flatnonzero(~np.isnan(piece.labels[piece.first_target :])):
            known = piece.timestamps[0] // unit < piece.timestamps[position] // unit
            wanted[piece.user_id, int(position)] = (known, piece.labels[position])
    assert one.keys() == wanted.keys() and len(one) > 20
    assert all(one[k][1:] == wanted[k] for k in one)
    known = sum(bool(w[0]) for w in wanted.values())
    assert counted == Coverage(len(wanted), known) and 0 < counted.share <= 1
    destroy_distributed()
    shares = run_ranks(of_split, 2, tmp_path, mode, "fsdp" if mode == "daily" else "ddp")
    assert [share[1] for share in shares] == [counted] * 2
    assert all(share[0] for share in shares) and not shares[0][0].keys() & shares[1][0].keys()
    for key, (vector, *rest) in {**shares[0][0], **shares[1][0]}.items():
        torch.testing.assert_close(vector, one[key][0], atol=1e-4, rtol=0)
        assert tuple(rest) == one[key][1:]


def test_a_model_of_ids_has_user_vectors_too(tmp_path: Path) -> None:
    parts = list(exposure_vectors(build(tmp_path, item_llm__enabled=False), "test", "nearline"))
    known = torch.cat([part.users[part.has_user] for part in parts])
    assert len(known) > 20 and bool((known != 0).any(1).all())
