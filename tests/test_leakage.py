"""What an exposure may not see: its own label and action, its second, what comes later, other users."""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from torch import Tensor

from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.events import Piece
from hllm_torchrec.models.hllm import HLLM
from tests.helpers import fixtures
from tests.helpers.naive_model import alone, config, exposures, run


def logits_by_exposure(batch: HybridBatch, logits: Tensor) -> dict[tuple[int, int], float]:
    """Keyed by (piece, position)."""
    piece = torch.repeat_interleave(torch.arange(batch.user_ids.numel()), batch.query_offsets.diff())
    keys = zip(piece[batch.target_query].tolist(), batch.positions.tolist(), strict=True)
    return dict(zip(keys, logits.tolist(), strict=True))


def busiest(pieces: Iterable[Piece]) -> tuple[Piece, int]:
    """A long user and an exposure in the middle with company in its second and events on both sides."""
    for piece in pieces:
        for target in exposures(piece):
            second = piece.timestamps[target]
            same = int((piece.timestamps == second).sum())
            if 6 < target < piece.item_ids.size - 6 and same > 2:
                return piece, target
    raise AssertionError("the generated shop has no such exposure")


def flipped(piece: Piece, where: np.ndarray, items: bool = False) -> Piece:
    """Labels turned round and actions (and items) replaced at `where`."""
    labels, actions, ids = piece.labels.copy(), piece.actions.copy(), piece.item_ids.copy()
    labels[where] = 1 - labels[where]
    actions[where] = (actions[where] + 2) % 6 + 1
    if items:
        ids[where] = ids[where] % fixtures.ITEMS + 1
    return dataclasses.replace(piece, labels=labels, actions=actions, item_ids=ids)


def own(piece: Piece, target: int) -> Piece:
    return flipped(piece, np.arange(piece.item_ids.size) == target)


def same_second(piece: Piece, target: int) -> Piece:
    others = (piece.timestamps == piece.timestamps[target]) & (np.arange(piece.item_ids.size) != target)
    return flipped(piece, others, items=True)


def same_second_is_no_exposure(piece: Piece, target: int) -> Piece:
    others = (piece.timestamps == piece.timestamps[target]) & (np.arange(piece.item_ids.size) != target)
    return dataclasses.replace(piece, labels=np.where(others, np.nan, piece.labels).astype(np.float32))


def later(piece: Piece, target: int) -> Piece:
    return flipped(piece, piece.timestamps > piece.timestamps[target], items=True)


def later_times(piece: Piece, target: int) -> Piece:
    after = piece.timestamps > piece.timestamps[target]
    return dataclasses.replace(piece, timestamps=np.where(after, piece.timestamps + 12_345, piece.timestamps))


def nothing_later(piece: Piece, target: int) -> Piece:
    return alone(piece, target)


def earlier(piece: Piece, target: int) -> Piece:
    return flipped(piece, piece.timestamps < piece.timestamps[target])


HIDDEN = (own, same_second, same_second_is_no_exposure, later, later_times, nothing_later)


@pytest.mark.parametrize("change", HIDDEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("fusion", "history", "actions"),
    [
        ("late", "all", "summed"),
        ("early", "all", "summed"),
        ("early", "positive", "summed"),
        ("early", "all", "interleaved"),
    ],
)
def test_a_logit_does_not_depend_on_its_own_label_its_second_or_what_comes_later(
    fusion: str, history: str, actions: str, training: bool, change: Callable[[Piece, int], Piece]
) -> None:
    gate = {"action_gate": actions == "summed"}
    cfg = config(fusion, data={"history": history}, features=gate, user={"actions": actions})
    model = fixtures.model(cfg)
    piece, target = busiest(fixtures.pieces("train"))
    before, after, control = (
        logit_of(model, cfg, p, target, training) for p in (piece, change(piece, target), earlier(piece, target))
    )
    assert after == pytest.approx(before, abs=1e-5)
    assert abs(control - before) > 1e-3, "what was earlier does matter, so the comparison can fail"


@torch.no_grad()
def logit_of(model: HLLM, cfg: Config, piece: Piece, target: int, training: bool) -> float:
    company = fixtures.pieces("train")[2]
    batch, output = run(model, cfg, [company, piece], training)
    return logits_by_exposure(batch, output.logits)[(1, piece.offset + target)]


def test_other_users_of_the_batch_do_not_matter() -> None:
    cfg = config("early")
    model = fixtures.model(cfg)
    piece = fixtures.pieces("train")[4]
    with torch.no_grad():
        single = run(model, cfg, [piece])[1].logits
        batch, together = run(model, cfg, [*fixtures.pieces("train")[:3], piece])
    mine = batch.user_ids[torch.repeat_interleave(batch.query_offsets.diff())] == piece.user_id
    torch.testing.assert_close(together.logits[mine], single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fusion", ["late", "early"])
@pytest.mark.parametrize("training", [False, True])
def test_events_younger_than_the_feedback_delay_are_not_seen(fusion: str, training: bool) -> None:
    piece, target = busiest(fixtures.pieces("train"))
    second = piece.timestamps[target]
    before = np.unique(piece.timestamps[piece.timestamps < second])
    delay = int(second - before[-2])  # the last two seconds before the request are too young
    cfg = config(fusion, data={"feedback_delay": delay})
    model = fixtures.model(cfg)
    others = np.arange(len(piece)) != target
    young = flipped(piece, (piece.timestamps >= second - delay) & others, items=True)
    known = flipped(piece, piece.timestamps < second - delay)
    expected, found, control = (logit_of(model, cfg, p, target, training) for p in (piece, young, known))
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(control - expected) > 1e-3
    without = config(fusion)
    assert abs(logit_of(model, without, young, target, training) - expected) > 1e-3, "the delay is what hides them"
