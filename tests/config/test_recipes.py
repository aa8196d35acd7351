"""Recipes: what is chosen from the facts of a dataset, and what a file or an option sets stays."""

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from hllm_torchrec.config.recipes import RECIPES, DatasetFacts, choices_of_run, chosen_fields, recipe_choices
from hllm_torchrec.data.recipe_facts import words_of_most

FILMS = DatasetFacts(
    users=900,
    items=1_000,
    exposures=80_000,
    labels=(30_000, 50_000),
    graded=True,
    words={"title": 6.0, "plot": 50.0, "tagline": 0.0},
    item_features={"genres": 20},
    user_features={"age": 7, "phone": 900_000},
)


def chosen(given: dict[str, Any] | None = None, **facts: Any) -> dict[str, Any]:
    return {one.name: one.value for one in recipe_choices("ranking", replace(FILMS, **facts), given or {})}


def test_a_ranking_recipe_reads_what_is_there() -> None:
    assert chosen() == {
        "item_llm.text_keys": ["title", "plot"],
        "item_llm.max_text_length": 128,
        "data.item_features": ["genres"],
        "data.user_features": ["age"],
        "data.evidence": ["factors", "items", "users", "neighbors", "tastes", "crosses"],
        "features.item_id": True,
        "data.item_vectors": ["factors"],
        "objective.value_weight": 0.5,
    }


def test_rare_items_have_no_id_and_items_without_text_no_encoder() -> None:
    rare = chosen(items=5_000)
    assert (rare["features.item_id"], rare["data.item_vectors"]) == (False, [])
    without = chosen(words={"title": 0.0}, graded=False, item_features={}, user_features={})
    assert without == {
        "item_llm.enabled": False,
        "data.evidence": ["factors", "items", "users", "tastes", "crosses"],
        "features.item_id": True,
        "data.item_vectors": ["factors"],
    }
    assert chosen(words={"title": 0.0}, items=5_000)["features.item_id"] is True  # else items would have no features
    assert chosen(words={"description": 900.0})["item_llm.max_text_length"] == 256


def test_a_handful_of_users_has_no_evidence() -> None:
    assert chosen(users=19)["data.evidence"] == [] and chosen(users=20)["data.evidence"]


def test_features_that_cannot_name_a_table_are_left_out_and_said() -> None:
    features = {"action": 3, "genres": 20, "geo.country": 4, "time_year": 9}
    for task in ("ranking", "retrieval"):
        facts = replace(FILMS, item_features=features)
        (choice,) = (one for one in recipe_choices(task, facts, {}) if one.name == "data.item_features")
        assert choice.value == ["genres"]
        assert choice.reason.endswith("; action, geo.country, time_year cannot name a table: rename the column")


def test_what_is_set_is_not_chosen() -> None:
    given = {"item_llm": {"text_keys": ["title"]}, "features": {"item_id": False}, "data": None}
    assert chosen().keys() - chosen(given).keys() == {"item_llm.text_keys", "features.item_id"}


def test_every_choice_says_why() -> None:
    texts = [str(one) for one in recipe_choices("ranking", FILMS, {})]
    assert "item_llm.max_text_length: 128, chosen because the columns' 95th percentiles are 56 words in total" in texts
    assert all(", chosen because " in text for text in texts)


@pytest.mark.parametrize(("labels", "only"), [((0, 80_000), 1), ((80_000, 0), 0)])
def test_labels_of_one_class_are_refused(labels: tuple[int, int], only: int) -> None:
    with pytest.raises(ValueError, match=f"recipe: ranking: all 80,000 training exposures have label {only}: a rank"):
        chosen(labels=labels)


@pytest.mark.parametrize("task", list(RECIPES))
def test_a_resumed_run_has_all_its_choices_whatever_the_dataset_says_now(task: str) -> None:
    rich = recipe_choices(task, FILMS, {})
    poor = recipe_choices(task, DatasetFacts(1, 10**6, 2, (1, 1), False), {})
    assert {one.name for one in rich + poor} <= {*chosen_fields(task)}
    saved: dict[str, Any] = {}
    for one in rich:
        section, _, name = one.name.rpartition(".")
        (saved.setdefault(section, {}) if section else saved)[name] = one.value
    assert {one.name: one.value for one in choices_of_run(task, saved, {})} == {one.name: one.value for one in rich}
    left = rich[-1].name  # of a version without this field
    section, _, name = left.rpartition(".")
    del (saved[section] if section else saved)[name]
    assert left not in {one.name for one in choices_of_run(task, saved, {})}
    assert "item_llm.text_keys" not in {
        one.name for one in choices_of_run(task, saved, {"item_llm": {"text_keys": []}})
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the red  door", 3),
        ("日本語のタイトル", 8),
        ("ab 日本 cd", 4),
        ("한국어 영화 제목", 3),
        ("ไทย", 3),
        (" ", 0),
        (None, 0),
    ],
)
def test_scripts_without_spaces_have_a_word_for_each_character(text: str | None, words: int) -> None:
    assert words_of_most(pa.chunked_array([pa.array([text], pa.string())])) == words
