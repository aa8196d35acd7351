"""Inputs made without the collator are its inputs, slot by slot; scores of many requests are those of one at a time."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from hllm_torchrec.data.collate import Collator
from hllm_torchrec.data.events import Events, Piece
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.run_loader import load_run
from hllm_torchrec.inference.item_embedding import embed_items
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from hllm_torchrec.serving.batch_scorer import BatchScorer, Request
from hllm_torchrec.serving.scorer import Scorer, UserHistory
from tests.helpers import fixtures, task_shop, training_fixtures
from tests.helpers.served_runs import HSTU, RUNS, settings, trained

SMALL: dict[str, Any] = {"optim__ema": 0.0, "parallel__dense": "ddp"}
OPEN = {"kind": "hash", "rows": 100}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in RUNS},
    "interleaved": ("early", {"user__actions": "interleaved", "features__action_gate": False}),
    "interleaved late": ("late", {"user__actions": "interleaved", "features__action_gate": False}),
    "cold": ("late", {"data__cold_dropout": 0.1}),
    "cold vectors": ("early", {"data__cold_dropout": 0.1, "data__item_vectors": ["factors"]}),
    "open": ("early", {"features__tables": dict.fromkeys(("item_id", "country", "genres", "action"), OPEN)}),
    "open users": ("late", {"features__tables": {"country": OPEN}}),
    "half": ("early", {"features__table_dtype": "fp16", "features__shard_from_rows": 3}),
    "bare": ("late", {"features__time_depth": 0, "features__action": False, "features__action_gate": False}),
    "hstu late": ("late", {"user__encoder": "hstu", "user__shape": {**HSTU, "preset": "research"}}),
    "long": ("early", {"data__max_history": 12}),
    "positive": ("early", {"data__history": "positive"}),
}
KINDS = {kind: (base, more) for kind, (base, more) in KINDS.items() if "leave" not in base}
LATER = 90


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


@pytest.fixture(params=list(KINDS))
def scorers(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Scorer, BatchScorer]:
    base, more = KINDS[request.param]
    experiment = build_experiment(settings(base, tmp_path, **(SMALL | more)), init_distributed())
    torch.manual_seed(1)
    for parameter in experiment.hllm.head.parameters():  # at the start the head hardly reads its inputs
        torch.nn.init.normal_(parameter, std=0.3)
    return Scorer(experiment), BatchScorer(experiment)


def users(count: int) -> list[Piece]:
    by_length = sorted(fixtures.pieces("test"), key=len)
    return [by_length[at] for at in np.linspace(0, len(by_length) - 1, count).astype(int)]


def past(piece: Piece, end: int | None = None) -> UserHistory:
    return UserHistory(piece.user_id, **piece[: len(piece) if end is None else end].columns)


def test_every_slot_and_every_score_is_that_of_the_collator_and_the_scorer(
    scorers: tuple[Scorer, BatchScorer],
) -> None:
    plain, batched = scorers
    experiment, hllm = plain.experiment, plain.hllm
    spec = replace(experiment.batch_spec, visibility="second", numeric_features=())
    collator = Collator(experiment.dataset, spec, item_vectors=experiment.item_vectors)
    for piece in users(3):
        time = int(piece.timestamps[-1]) + 2 + spec.feedback_delay
        asked = Events.at(np.full(5, time), item_ids=[0, 1, 3, 17, 39], labels=np.zeros(5))
        whole = Events.concat([piece, asked])
        batch = collator([Piece(**whole.columns, user_id=piece.user_id, first_target=len(piece))], 0, 0)
        with torch.no_grad():
            x_TD, x_QD, target_XD, _ = hllm.slot_features(batch, hllm.item_embeddings(batch.unique_items))
            ours, times = batched.inputs.history(piece)
            shared = batched.inputs.requests([piece.user_id], [time], None)
        torch.testing.assert_close(ours, x_TD, atol=1e-6, rtol=1e-5)
        assert torch.equal(times, batch.timestamps) and x_TD.std() > 0.01
        items = batched.inputs.items[torch.from_numpy(asked.item_ids)]
        if hllm.fusion.query_is_user:
            torch.testing.assert_close(shared, x_QD, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(items, target_XD, atol=1e-6, rtol=1e-5)
        else:
            torch.testing.assert_close(items + shared, x_QD, atol=1e-6, rtol=1e-5)

    rng, requests, expected = np.random.default_rng(0), [], []
    for number, piece in enumerate(users(6)):
        time = int(piece.timestamps[-1]) + (0 if number == 2 else LATER)  # 0: the last second is not yet visible
        history = past(piece, 0 if number == 1 else None)
        items = rng.integers(0, plain.num_items, (7, 3, 1, 9, 0, 2)[number])
        expected.append(plain.score(history, items, time))
        state = batched.read(history)
        assert (state.nbytes > state.cache.nbytes) == (experiment.evidence is not None)
        requests.append(Request(state, items, time))
    found = batched.score_batch(requests)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=2e-5)
    assert np.concatenate(expected).std() > 0.01
    one_each = [replace(request, items=request.items[:1]) for request in requests]
    for ours, theirs in zip(batched.score_batch(one_each), expected, strict=True):
        np.testing.assert_allclose(ours, theirs[:1], atol=2e-5, rtol=2e-5)


def test_more_candidates_than_fit_at_once_and_groups_of_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = BatchScorer(build_experiment(settings("late", tmp_path, **SMALL), init_distributed()))
    states = [scorer.read(past(piece)) for piece in users(4)]
    time = int(max(state.history.timestamps[-1] for state in states)) + LATER
    requests = [Request(state, np.arange(size), time) for state, size in zip(states, (3, 30, 2, 5))]
    expected = [scorer.score_batch([request])[0] for request in requests]
    monkeypatch.setattr("hllm_torchrec.serving.batch_scorer.ROWS_AT_ONCE", 7)
    for ours, theirs in zip(scorer.score_batch(requests), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_new_items_are_scored_as_by_the_scorer(tmp_path: Path) -> None:
    experiment = build_experiment(settings("late", tmp_path, **SMALL), init_distributed())
    journal = tmp_path / "new_items.jsonl"
    batched = BatchScorer(experiment, journal=journal)
    state = batched.read(past(users(3)[1]))
    time = int(state.history.timestamps[-1]) + LATER
    batched.add_items(["n1", "n2"], {"title": ["word1 word2", "word9"]}, {"genres": [["drama"], "noir"]})
    names = ["n1", "s3", "n2"]
    first = batched.score(state, names, time)
    batched.add_items(["n1"], {"title": ["word7"]})  # another text
    again = batched.score(state, names, time)
    assert first[0] != again[0] and np.allclose(first[1:], again[1:], atol=1e-6)
    plain = Scorer(build_experiment(settings("late", tmp_path, **SMALL), init_distributed()), journal=journal)
    np.testing.assert_allclose(again, plain.score(state.history, names, time), atol=2e-5)


@pytest.mark.parametrize("fusion", ["early", "late"])
@pytest.mark.parametrize("tasks", [{}, task_shop.TASKS])
def test_tasks_and_context_are_those_of_the_scorer(fusion: str, tasks: dict[str, Any], tmp_path: Path) -> None:
    dataset = task_shop.dataset()
    changed: dict[str, Any] = task_shop.SETTINGS | {
        "data__dataset": dataset.root,
        "data__context": ["device", "price"],
        "objective__fusion": fusion,
        "objective__tasks": tasks,
        "objective__position_bias": ["place"],
    }
    experiment = build_experiment(training_fixtures.config(tmp_path, **changed), init_distributed())
    torch.manual_seed(1)
    for parameter in experiment.hllm.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plain, batched = Scorer(experiment), BatchScorer(experiment)
    contexts = [{"device": "phone", "price": 3.5}, {"device": "submarine", "price": None}, {"device": None, "price": 1}]
    requests, expected = [], []
    for user, context in enumerate(contexts, start=1):
        events = dataset.user_events(user)
        history, time = UserHistory(user, **events.columns), int(events.timestamps[-1]) + LATER
        items = np.arange(1, 4 + user)
        requests.append(Request(batched.read(history), items, time, batched.context_columns(context)))
        expected.append((plain.score(history, items, time, context), plain.score_tasks(history, items, time, context)))
        np.testing.assert_allclose(batched.score(history, items, time, context), expected[-1][0], atol=1e-5)
    for outputs, (logits, by_task) in zip(batched.score_batch(requests), expected, strict=True):
        np.testing.assert_allclose(outputs.reshape(len(logits), -1)[:, 0], logits, atol=1e-5)
        found = batched.predictions(outputs)
        assert found.keys() == by_task.keys() and len(found) == max(1, len(tasks))
        for name, values in found.items():
            np.testing.assert_allclose(values, by_task[name], rtol=1e-4, atol=1e-5)
    assert np.concatenate([logits for logits, _ in expected]).std() > 0.01
    with pytest.raises(ValueError, match="the request has no 'price', which the model reads"):
        batched.context_columns({"device": "phone"})


def test_numbers_that_a_state_keeps_are_those_of_the_events_that_a_request_sees(tmp_path: Path) -> None:
    features = {"data__numeric_features": ["user_mean", "history_length"], "data__max_history": 64}
    scorer = BatchScorer(build_experiment(settings("early", tmp_path, **SMALL, **features), init_distributed()))
    history = past(users(3)[2])
    state, items, last = scorer.read(history), np.arange(9), int(history.timestamps[-1])
    found = [scorer.score(state, items, time) for time in (last + LATER, last, last + LATER, last + 2 * LATER)]
    assert len(state.numbers) == 2  # with the last second, and without
    expected = [scorer.score(scorer.read(history), items, time) for time in (last + LATER, last)]
    for ours, theirs in zip(found, [*expected, expected[0]]):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(*expected)


@pytest.mark.slow  # a training run
@pytest.mark.parametrize("kind", ["late", "evidence"])
def test_items_from_a_store_give_the_scores_of_encoded_ones_up_to_its_rounding(kind: str, tmp_path: Path) -> None:
    run, _ = trained(kind)
    with BatchScorer.of_run(run, "latest") as encoded:
        state = encoded.read(past(users(3)[2]))
        time = int(state.history.timestamps[-1]) + LATER
        expected, mark = encoded.score(state, np.arange(20), time), encoded.mark
    loaded = load_run(run, "latest", init_distributed(), encode=False)
    embed_items(loaded.experiment, tmp_path / "items", "fp32")
    encoded_rows: list[int] = []

    def count(module: torch.nn.Module, _: Any, rows: Any) -> None:
        if isinstance(module, ItemLLM):
            encoded_rows.append(len(rows))

    with register_module_forward_hook(count), BatchScorer.of_run(run, "latest", store=tmp_path / "items") as stored:
        found = stored.score(stored.read(past(users(3)[2])), np.arange(20), time)
        assert stored.mark != mark
    assert encoded_rows == [1]  # the unknown item; neither the model nor its evidence needs more
    assert 0 < np.abs(found - expected).max() < 2e-3  # the store is read, and its rounding is small
    assert expected.std() > 0.01
