"""Interleaved actions against loops over events: what each token bears, sees and predicts."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.events import Piece
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.models.hllm import HLLM
from hllm_torchrec.modules.features.timestamps import TIME_FEATURES
from hllm_torchrec.serving.scorer import Scorer, UserHistory
from tests.helpers import fixtures, naive_model
from tests.helpers import training_fixtures as training

SHAPES: dict[str, dict[str, Any]] = {
    "llm": fixtures.USER,
    "hstu": {"width": 16, "layers": 2, "heads": 2, "divide_by": "length"},
    "sasrec": {"width": 16, "layers": 1, "heads": 2, "max_positions": 128},
    "ligr": {"width": 16, "layers": 1, "heads": 2, "max_positions": 128},
}

ENCODERS = ["llm", "hstu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sasrec", "ligr"))]


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def interleaved(fusion: str, encoder: str = "llm", **sections: Any) -> Config:
    """Every feature on but the gate."""
    user = {"actions": "interleaved", "encoder": encoder, "shape": SHAPES[encoder]}
    sections["data"] = {"max_history": 64} | sections.get("data", {})
    return naive_model.config(fusion, user=user, features={"action_gate": False}, **sections)


class InterleavedNaive(naive_model.Naive):
    """One exposure at a time: item, action, item, action, ..., query; the user encoder runs over the plain rows."""

    def __init__(self, model: HLLM, cfg: Config) -> None:
        self.model, self.cfg = model, cfg
        self.dataset = fixtures.dataset()
        self.texts = model.item_embeddings(torch.arange(fixtures.ITEMS + 1))
        self.tokens: dict[tuple[int, int], list[Tensor]] = {}

    def text(self, item: int) -> Tensor:
        return self.texts[item]

    def event_tokens(self, piece: Piece, i: int) -> list[Tensor]:
        if (piece.user_id, i) not in self.tokens:
            of_item = self.item(int(piece.item_ids[i])) + self.time(int(piece.timestamps[i]))
            self.tokens[piece.user_id, i] = [of_item, self.row("action", int(piece.actions[i]))]
        return self.tokens[piece.user_id, i]

    def rows(self, piece: Piece, target: int) -> tuple[list[Tensor], list[int]]:
        """Tokens and their seconds of all events of earlier seconds."""
        earlier = [i for i in range(target) if piece.timestamps[i] < piece.timestamps[target]]
        tokens = [token for i in earlier for token in self.event_tokens(piece, i)]
        return tokens, [int(piece.timestamps[i]) for i in earlier for _ in range(2)]

    def run(self, rows: list[Tensor], times: list[int]) -> Tensor:
        hidden, _ = self.model.user(torch.stack(rows), torch.tensor([0, len(rows)]), torch.tensor(times))
        return hidden[-1]

    def logit(self, piece: Piece, target: int) -> Tensor:
        rows, times = self.rows(piece, target)
        item = self.item(int(piece.item_ids[target]))
        query = self.request(piece, target) - self.row("action", 0)  # no action, not even the unknown one
        query = query + (self.model.user_token if self.model.fusion == "late" else item)
        user = self.run([*rows, query], [*times, int(piece.timestamps[target])])
        late = self.model.fusion == "late"
        return self.model.head(user[None], item[None])[0] if late else self.model.head(user[None])[0]


def short_pieces() -> list[Piece]:
    """Users of few events, one of them with a history before the split's part."""
    late = next(p for p in fixtures.pieces("valid") if 0 < p.first_target and p.item_ids.size < 20)
    return [*(p for p in fixtures.pieces("train") if p.item_ids.size < 16 and p.user_id != late.user_id), late]


@pytest.mark.parametrize("fusion", [pytest.param("late", marks=pytest.mark.slow), "early"])
@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_logits_equal_a_loop_over_events_and_exposures(encoder: str, fusion: str) -> None:
    cfg = interleaved(fusion, encoder)
    model = fixtures.model(cfg)
    naive, pieces = InterleavedNaive(model, cfg), short_pieces()
    found = naive_model.run(model, cfg, pieces)[1].logits
    expected = torch.stack([naive.logit(p, t) for p in pieces for t in naive_model.exposures(p)])
    assert found.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_the_next_item_is_predicted_at_the_token_of_the_last_action(encoder: str) -> None:
    """Both tasks from one sequence: the model ranks by queries, too."""
    cfg = interleaved("early", encoder)
    model = fixtures.model(cfg)
    naive, pieces = InterleavedNaive(model, cfg), short_pieces()
    batch = fixtures.collator(cfg, training=True)(pieces, 0, 0)
    output = model(batch, want_next=True)
    number = 0
    for piece in pieces:
        for target in naive_model.exposures(piece):
            rows, times = naive.rows(piece, target)
            expected = (
                model.project_next(naive.run(rows, times)) if rows else torch.zeros(model.project_next.out_features)
            )
            torch.testing.assert_close(output.next_items[number], expected, rtol=1e-4, atol=1e-5)
            number += 1
    assert number > 20
    plain = fixtures.collator(naive_model.config("early"), training=True)(pieces, 0, 0)
    assert torch.equal(batch.next_items, plain.next_items) and torch.equal(batch.next_rows, 2 * plain.next_rows + 1)
    assert batch.item_ids[batch.next_rows].tolist() == plain.item_ids[plain.next_rows].tolist()


def test_tokens_bear_an_item_or_an_action_and_a_query_no_action() -> None:
    cfg = interleaved("early")
    batch = fixtures.collator(cfg)(short_pieces(), 0, 0)
    lengths = {name: jagged.lengths() for name, jagged in batch.features.to_dict().items()}
    history = batch.item_ids.numel()
    is_item = torch.arange(history) % 2 == 0
    assert torch.equal(lengths["action"][:history], (~is_item).long()) and not lengths["action"][history:].any()
    for name in ("item_id", TIME_FEATURES[0]):
        assert torch.equal(lengths[name][:history], is_item.long()) and lengths[name][history:].all()
    assert not lengths["genres"][:history][~is_item].any() and lengths["genres"][:history][is_item].any()
    assert torch.equal(batch.item_ids[0::2], batch.item_ids[1::2])
    assert torch.equal(batch.timestamps[0::2], batch.timestamps[1::2])
    assert torch.equal(batch.next_times[0::2], batch.timestamps[0::2]), "after an item comes its own action"
    assert (batch.query_visible % 2 == 0).all()


@torch.no_grad()
def test_an_action_of_the_same_second_or_later_does_not_reach_a_score() -> None:
    cfg = interleaved("early", "hstu")
    model = fixtures.model(cfg)
    piece = next(p for p in fixtures.pieces("train") if 15 < p.item_ids.size < 22)
    before = naive_model.run(model, cfg, [piece])[1].logits
    for number, target in enumerate(naive_model.exposures(piece)):
        changed = piece.actions.copy()
        hidden = piece.timestamps >= piece.timestamps[target]
        changed[hidden] = changed[hidden] % 5 + 1
        after = naive_model.run(model, cfg, [dataclasses.replace(piece, actions=changed)])[1].logits
        torch.testing.assert_close(after[: number + 1], before[: number + 1], rtol=1e-5, atol=1e-6)
    changed = piece.actions % 5 + 1
    assert (
        naive_model.run(model, cfg, [dataclasses.replace(piece, actions=changed)])[1].logits - before
    ).abs().max() > 0.01


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"features": {"action": False}}, "user.actions: 'interleaved' while features.action is false: .*set it true"),
        ({"features": {"action_gate": True}}, "user.actions: 'interleaved' with features.action_gate: .*write summed"),
        (
            {"user": {"encoder": "sasrec", "shape": {"width": 8, "layers": 1, "max_positions": 127}}},
            "user.shape.max_positions: 127: must be at least the longest history, 128 .*in tokens",
        ),
    ],
)
def test_what_does_not_fit_interleaved_actions_is_an_error(sections: dict[str, Any], message: str) -> None:
    sections["user"] = {"actions": "interleaved"} | sections.get("user", {})
    with pytest.raises(ConfigError, match=message):
        fixtures.config(data={"max_history": 64}, **sections)


@pytest.mark.slow
def test_a_run_trains_both_tasks_and_is_served_from_a_cache(tmp_path: Path) -> None:
    options = {"user__actions": "interleaved", "objective__fusion": "early", "objective__generative_weight": 0.5}
    settings = training.config(tmp_path / "run", max_steps=3, data__stochastic_length=1.3, **options)
    training.train(settings)
    step = training.lines(tmp_path / "run", "step")[-1]
    assert step["loss_cls"] > 0 and step["loss_gen"] > 0 and 0 < step["history_kept"] < 1
    scorer = Scorer(build_experiment(settings, init_distributed()), micro_batch=3)
    piece = max(fixtures.pieces("test"), key=lambda p: p.item_ids.size)
    target = naive_model.exposures(piece)[-1]
    start = max(0, target - 20)
    cut = piece.cut(start, len(piece), target)
    experiment = scorer.experiment
    with torch.no_grad():
        batch = scorer._collator([cut], 0, 0)
        expected = experiment.model(batch).logits[:1].numpy()
    events = UserHistory(piece.user_id, **cut[: target - start].columns)
    state = scorer.extend(scorer.read(UserHistory(piece.user_id, **cut[:5].columns)), events.since(5))
    time, item = int(piece.timestamps[target]), piece.item_ids[target : target + 1]
    for user in (events, state):
        np.testing.assert_allclose(scorer.score(user, item, time), expected, rtol=2e-5, atol=2e-5)
    assert state.cache.length == 2 * (target - start)
