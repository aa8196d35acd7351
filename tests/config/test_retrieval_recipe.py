"""The recipe of retrieval: what it chooses, by what is in the data."""

from dataclasses import replace

from hllm_torchrec.config.recipes import DatasetFacts, retrieval

SHOP = DatasetFacts(
    users=5_000,
    items=2_400,
    exposures=43_000,
    labels=(0, 43_000),
    graded=False,
    words={"title": 12.0, "brand": 0.0},
    split="leave_one_out",
)


def chosen(facts: DatasetFacts) -> dict[str, object]:
    return {choice.name: choice.value for choice in retrieval(facts)}


def test_a_small_shop_with_texts_caches_the_embeddings_of_its_items() -> None:
    found = chosen(SHOP)
    assert found["item_llm.text_keys"] == ["title"] and found["item_llm.max_text_length"] == 32
    assert found["data.batch_users"] == 32 and found["data.max_history"] == 50
    assert found["evaluation.protocol"] == "leave_one_out" and "evaluation.retrieval" not in found
    assert found["stages"] == [{"name": "cached items", "epochs": 32, "item_embeddings": "cached"}]


def test_a_large_one_takes_larger_steps_and_reads_its_events_a_few_times() -> None:
    found = chosen(replace(SHOP, users=400_000, items=90_000, exposures=20_000_000))
    assert found["data.batch_users"] == 128
    assert found["data.max_history"] == 200 and found["stages"][0]["epochs"] == 4


def test_without_texts_it_is_a_model_of_ids_without_a_cache() -> None:
    found = chosen(replace(SHOP, words={}))
    assert found["item_llm.enabled"] is False
    assert found["stages"] == [{"name": "ids", "epochs": 32}]


def test_another_split_has_no_protocol_but_measures_retrieval() -> None:
    found = chosen(replace(SHOP, split="time"))
    assert found["evaluation.retrieval"] is True and "evaluation.protocol" not in found


def test_every_choice_says_why() -> None:
    assert all(str(choice).partition(", chosen because ")[2] for choice in retrieval(SHOP))
