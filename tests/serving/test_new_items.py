"""Items that came after `hllm prepare`: their text counts, their ID is unknown, and every process knows them."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hllm_torchrec.data.new_item_journal import JOURNAL, NewItem, NewItemJournal, new_items
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.embedding.tables import local_shards
from hllm_torchrec.inference.new_items import DatasetWithNewItems
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.item_source import StoredItems
from hllm_torchrec.serving.recommend import recommend
from hllm_torchrec.serving.scorer import Scorer, UserHistory
from tests.helpers import fixtures
from tests.serving.test_recommend import LATER, trained
from tests.serving.test_scorer import history, settings

TWIN = 5
"""An item whose ID row and dense features are made those of the unknown item: a new item like it scores the same."""


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def experiment(folder: Path, kind: str = "early", **more: Any) -> Experiment:
    built = build_experiment(settings(kind, folder, **{"optim__ema": 0.0, **more}), init_distributed())
    for values, row, _ in local_shards(built.model.state_dict()["features.tables.embedding_bags.item_id.weight"]):
        assert row == 0
        values[TWIN] = values[0]
    if built.item_vectors is not None:
        built.item_vectors[TWIN] = 0
    return built


def like(item: int) -> tuple[dict[str, list[str]], dict[str, list[list[str]]]]:
    """Texts and features of an item of the shop."""
    dataset = fixtures.dataset()
    texts = {name: [dataset.items[name][item - 1].as_py()] for name in ("title", "brand")}
    values, offsets = dataset.feature_ids("item", "genres")
    known = vocabulary()
    return texts, {"genres": [[known[v - 1] for v in values[offsets[item] : offsets[item + 1]]]]}


def vocabulary() -> list[str]:
    values: list[str] = pq.read_table(fixtures.dataset().root / "features" / "genres.parquet")["value"].to_pylist()
    return values


def twin_id() -> str:
    raw: str = fixtures.dataset().items["raw_item_id"][TWIN - 1].as_py()
    return raw


def longest() -> Any:
    return max(fixtures.pieces("test"), key=lambda piece: piece.item_ids.size)


@pytest.mark.parametrize("kind", ["early", "late"])
def test_a_new_item_scores_like_its_twin_whose_id_is_unknown(kind: str, tmp_path: Path) -> None:
    scorer = Scorer(experiment(tmp_path, kind), 3, journal=tmp_path / "noon.jsonl")
    piece = longest()
    state, time = scorer.read(history(piece, 20)), int(piece.timestamps[20]) + 5
    texts, features = like(TWIN)
    assert scorer.add_items(["n1"], texts, features) == 1
    assert scorer.add_items(["n2"], {"title": ["word1 word2"]}) == 1
    # Known already: from the journal, and in the dataset.
    again = {name: [column[0], "other"] for name, column in texts.items()}
    assert scorer.add_items(["n1", "s3"], again, {"genres": [features["genres"][0], []]}) == 0
    twin, new, other = scorer.score(state, [scorer.raw_item_ids(np.array([TWIN]))[0], "n1", "n2"], time)
    np.testing.assert_allclose(new, twin, atol=1e-5)
    assert abs(other - twin) > 1e-4
    number = fixtures.dataset().num_items
    assert scorer.item_ids(["n1", "n2"]).tolist() == [number, number + 1]
    assert scorer.raw_item_ids(np.array([number + 1, 1])) == ["n2", fixtures.dataset().items["raw_item_id"][0].as_py()]
    # A new item in the history is its twin there, too.
    with_new, with_twin = (
        replace(history(piece, 20), item_ids=np.append(piece.item_ids[:19], item)) for item in (number, TWIN)
    )
    np.testing.assert_allclose(scorer.score(with_new, [1, 2], time), scorer.score(with_twin, [1, 2], time), atol=1e-5)


def test_a_text_that_changes_is_encoded_again_and_an_unknown_value_is_the_unknown_id(tmp_path: Path) -> None:
    scorer = Scorer(experiment(tmp_path), journal=tmp_path / "noon.jsonl")
    piece, (texts, features) = longest(), like(TWIN)
    ask = partial(scorer.score, scorer.read(history(piece, 20)), time=int(piece.timestamps[20]) + 5)
    scorer.add_items(["n0", "n1"], {"title": ["word3", "word4"]}, {"genres": [[], []]})
    before = ask(["n0", "n1"])
    scorer.add_items(["n1"], texts, features)
    after = ask(["n0", "n1", twin_id()])
    assert before[0] == after[0] and before[1] != after[1]
    np.testing.assert_allclose(after[1], after[2], atol=1e-5)
    scorer.add_items(["n2"], texts, {"genres": ["western"]})
    bags, offsets = scorer.experiment.dataset.feature_ids("item", "genres")
    assert bags[offsets[-2] :].tolist() == [0]
    assert ask(["n2"])[0] != after[1]


def test_scorers_of_other_processes_know_it_also_with_quantized_tables(tmp_path: Path) -> None:
    journal, piece = tmp_path / "noon.jsonl", longest()
    one = Scorer(experiment(tmp_path), journal=journal)
    with pytest.raises(
        ValueError, match=r"candidates: 1 of 2 are not in the dataset: 'n1'; register items that came after"
    ):
        one.score(history(piece, 20), [twin_id(), "n1"], LATER)
    texts, features = like(TWIN)
    other = Scorer(experiment(tmp_path), table_dtype="fp16", journal=journal)
    assert isinstance(other.hllm.item_source, StoredItems)
    other.add_items(["n1"], texts, features)
    scores = one.score(history(piece, 20), [twin_id(), "n1"], LATER)  # reads the journal again
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
    np.testing.assert_allclose(other.score(history(piece, 20), ["n1"], LATER), scores[1], atol=1e-2)
    third = Scorer(experiment(tmp_path), journal=journal)
    np.testing.assert_allclose(third.score(history(piece, 20), ["n1"], LATER), scores[1], atol=1e-5)


def test_a_state_fits_the_model_and_the_journal_that_made_it(tmp_path: Path) -> None:
    run, piece = trained("early"), longest()
    past = history(piece, 20)
    with Scorer.of_run(run, "best", init_distributed(), journal=tmp_path / "a") as one:
        one.add_items(["n1"], {"title": ["word1"]})
        new = replace(past, item_ids=np.append(past.item_ids[1:], one.item_ids(["n1"])))
        states, expected = [one.read(past), one.read(new)], one.score(past, [1, 2], LATER)
    destroy_distributed()
    with Scorer.of_run(run, "best", init_distributed(), journal=tmp_path / "b") as other:
        other.add_items(["n2"], {"title": ["word2"]})
        np.testing.assert_array_equal(other.score(states[0], [1, 2], LATER), expected)
        with pytest.raises(
            ValueError, match="made by another model, or from another dataset or journal .*read the hist"
        ):
            other.score(states[1], [1], LATER)
        with pytest.raises(ValueError, match="made by another model"):
            other.extend(states[1], history(piece, 21, 20))
    destroy_distributed()
    stranger = Scorer(experiment(tmp_path), journal=tmp_path / "a")
    with pytest.raises(ValueError, match="user .*: this state was made by another model"):
        stranger.score(states[0], [1], LATER)


def test_a_state_with_new_items_fits_a_scorer_that_has_not_read_the_journal_yet(tmp_path: Path) -> None:
    run, piece, journal = trained("early"), longest(), tmp_path / "noon.jsonl"
    with ExitStack() as stack:
        one, other, third = (
            stack.enter_context(Scorer.of_run(run, "best", init_distributed(), journal=journal)) for _ in range(3)
        )
        one.add_items(["n1"], {"title": ["word1"]})
        past = history(piece, 20)
        state = one.read(replace(past, item_ids=np.append(past.item_ids[1:], one.item_ids(["n1"]))))
        np.testing.assert_array_equal(other.score(state, [1, 2], LATER), one.score(state, [1, 2], LATER))
        assert third.extend(state, history(piece, 21, 20)).mark == state.mark


def test_raw_ids_are_texts_and_dense_ids_numbers(tmp_path: Path) -> None:
    scorer = Scorer(experiment(tmp_path), journal=tmp_path / "noon.jsonl")
    piece, dataset = longest(), fixtures.dataset()
    raw_items = scorer.raw_item_ids(piece.item_ids[:20])
    actions = [dataset.manifest["actions"]["names"][str(action)] for action in piece.actions[:20]]
    raw_user = dataset.users["raw_user_id"][piece.user_id - 1].as_py()
    named = scorer.history(raw_user, raw_items, piece.timestamps[:20], piece.labels[:20], actions)
    expected = history(piece, 20)
    for name, column in expected.columns.items():
        np.testing.assert_array_equal(getattr(named, name), column)
    assert named.user_id == piece.user_id and scorer.history(None, [], []).user_id == 0
    np.testing.assert_array_equal(
        scorer.score(named, raw_items[:4], LATER), scorer.score(expected, piece.item_ids[:4], LATER)
    )
    scorer.add_items(["2"], {"title": ["word1"]})  # a raw id of digits is no dense id
    assert scorer.score(named, ["2"], LATER)[0] != scorer.score(named, [2], LATER)[0]
    for wrong in ([1, "2"], [1.0, 2.0], np.array([1.5]), [True]):
        with pytest.raises(
            ValueError, match=r"candidates, entry [01]: .*all raw ids \(texts, as in the source\) or all"
        ):
            scorer.score(named, wrong, LATER)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="candidates: 2 of 3 are not in the dataset: '3', '9'"):
        scorer.score(named, ["2", "3", "9"], LATER)
    with pytest.raises(ValueError, match="raw ids: make the history with Scorer.history"):
        UserHistory(1, ["2", "3"], [1, 2], [0, 0], [0, 0])
    with pytest.raises(ValueError, match="raw ids: make the history with Scorer.history"):
        UserHistory("u1", [2, 3], [1, 2], [0, 0], [0, 0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="user: 1 of 1 are not in the dataset: 'u99'; give None"):
        scorer.history("u99", raw_items[:1], [1])
    with pytest.raises(ValueError, match="user: 7: a raw id is a text"):
        scorer.history(7, raw_items[:1], [1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="actions of user 'u1': 1 of 1 .*'buy'; it has 1, 2"):
        scorer.history("u1", raw_items[:1], [1], actions=["buy"])


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["early", "none"])
def test_recommend_lists_new_items(fusion: str, tmp_path: Path) -> None:
    root = fixtures.dataset("leave_one_out" if fusion == "none" else "time").root
    try:
        NewItemJournal(root / JOURNAL).append([NewItem("n1", {"title": "word1"}), NewItem("s3", {"title": "word2"})])
        found = recommend(trained(fusion), "u7", 100, init_distributed(), time=LATER, include_seen=True)
    finally:
        (root / JOURNAL).unlink()
    assert len(found.items) == fixtures.ITEMS + 1
    assert [item.text for item in found.items if item.raw_id == "n1"] == ["word1"]
    assert [item.text for item in found.items if item.raw_id == "s3"] != ["word2"]  # the dataset has it


def test_items_of_the_dataset_come_before_the_new_ones(tmp_path: Path) -> None:
    base = fixtures.dataset()
    grown = DatasetWithNewItems(base, [NewItem("n1", {"title": " word1 "}, {"genres": ["noir", "western"]})])
    assert grown.num_items == base.num_items + 1 and grown.num_table_items == base.num_items
    assert grown.items.slice(0, base.num_items - 1).equals(base.items)
    assert grown.text(["title"])["title"][base.num_items - 1].as_py() == "word1"
    assert grown.training_item_counts().tolist() == [*base.training_item_counts().tolist(), 0]
    values, offsets = grown.feature_ids("item", "genres")
    assert values[offsets[-2] :].tolist() == [vocabulary().index("noir") + 1, 0]
    assert grown.feature_ids("user", "country")[1].size == base.num_users + 1


@pytest.mark.parametrize(
    ("ids", "texts", "features", "message"),
    [
        (["n1", "n1"], {"title": ["a", "b"]}, {}, "raw_ids, entry 1: 'n1': it is given twice"),
        ([7], {"title": ["a"]}, {}, "raw_ids, entry 0: 7: an id must be a text that is not blank"),
        (["n1"], {"titel": ["a"]}, {}, r"texts.titel: unknown \(did you mean 'title'\?\)"),
        (["n1"], {"title": ["a", "b"]}, {}, "texts.title: must have one entry for each of the 1 ids"),
        (["n1"], {"title": [None]}, {}, "raw_ids, entry 0: 'n1': a text must be a str"),
        (["n1"], {}, {"genres": [[3]]}, "raw_ids, entry 0: 'n1': a feature's values must be a list of str"),
        (["n1"], {}, {"genre": ["a"]}, "features.genre: unknown"),
    ],
)
def test_wrong_items_are_an_error(ids: Any, texts: Any, features: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_items(fixtures.dataset(), ids, texts, features)


def test_a_line_that_was_cut_off_is_not_read_and_the_next_writer_removes_it(tmp_path: Path) -> None:
    journal = NewItemJournal(tmp_path / "noon.jsonl")
    assert journal.read().items == []
    journal.append([NewItem("n1")])
    first = journal.read()
    with journal.path.open("ab") as file:
        file.write(b'{"id": "n2", "te')
    assert journal.read() == first and journal.read(first.end).items == []
    journal.append([NewItem("n3")])
    assert [item.id for item in journal.read().items] == ["n1", "n3"] and journal.read().name == first.name
    assert [item.id for item in journal.read(first.end).items] == ["n3"]
    with journal.path.open("a") as file:
        file.write(json.dumps({"id": 4}) + "\n")
    with pytest.raises(ValueError, match="noon.jsonl, line 4: .*is no item: remove the line"):
        journal.read()
    journal.path.write_text("")
    with pytest.raises(ValueError, match="deleted or cut while in use: start this process again"):
        journal.read(first.end)


def test_appends_at_once_lose_nothing_and_number_the_items_alike(tmp_path: Path) -> None:
    path = tmp_path / "noon.jsonl"

    def add(writer: int) -> None:
        for number in range(10):
            NewItemJournal(path).append([NewItem(f"w{writer}-{number}"), NewItem("shared", {"title": str(writer)})])

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(add, range(6)))
    items = NewItemJournal(path).read().items
    assert {item.id for item in items} == {"shared", *(f"w{w}-{n}" for w in range(6) for n in range(10))}
    assert len(items) == 120


def test_other_threads_score_while_items_are_added(tmp_path: Path) -> None:
    scorer, past = Scorer(experiment(tmp_path), journal=tmp_path / "noon.jsonl"), history(longest(), 20)
    state, stop = scorer.read(past), Event()
    expected = scorer.score(state, [1, 2, 3], LATER)

    def ask() -> int:
        asked = 0
        while not stop.is_set() or not asked:
            np.testing.assert_array_equal(scorer.score(state, [1, 2, 3], LATER), expected)
            newest = scorer.num_items - 1
            assert np.isfinite(scorer.score(state, [newest], LATER)).all()
            asked += 1
        return asked

    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(ask) for _ in range(3)]
        for number in range(8):
            scorer.add_items([f"n{number}"], {"title": ["word1"]}, {"genres": [["noir"]]})
        stop.set()
        assert all(one.result() for one in waiting)


def test_a_dataset_at_a_url_needs_a_journal_of_its_own(tmp_path: Path) -> None:
    built = experiment(tmp_path)
    far = replace(built.config, data=replace(built.config.data, dataset="s3://shop/data"))
    built.config = far
    scorer = Scorer(built)
    with pytest.raises(
        ValueError, match="data.dataset: s3://shop/data: a dataset at a URL has no journal .*give `journal`"
    ):
        scorer.add_items(["n1"], {"title": ["word1"]})
    assert torch.is_grad_enabled()
