"""Facts of a dataset for recipes."""

from dataclasses import replace

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.recipe_facts import dataset_facts
from tests.helpers.growing_shop import NEW_ITEMS, append_day, prepare_shop


def test_a_dataset_with_appends_has_the_training_facts_of_its_base(tmp_path):
    before = dataset_facts(Dataset.open(prepare_shop(tmp_path)))
    after = dataset_facts(append_day(tmp_path))
    assert after.items == before.items + NEW_ITEMS
    kept = {name: getattr(after, name) for name in ("items", "words", "item_features", "user_features")}
    assert after == replace(before, **kept), "the appended day is after the training part"
    assert min(after.users, after.exposures, *after.labels) > 0
