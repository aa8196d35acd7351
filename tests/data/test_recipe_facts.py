"""Facts of a dataset for recipes: also of versions with appends, whose manifests have no counts of the parts."""

from pathlib import Path

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.recipe_facts import _train_part, dataset_facts
from tests.helpers.growing_shop import append_day, prepare_shop


def test_facts_of_a_dataset_with_appends_are_counted(tmp_path: Path) -> None:
    first = Dataset.open(prepare_shop(tmp_path))
    counted = {key: first.manifest["parts"]["train"][key] for key in ("users", "exposures", "positives")}
    assert _train_part(first) == counted
    grown = append_day(tmp_path)
    assert not grown.manifest["parts"]
    facts = dataset_facts(grown)  # the events are of days after the split: the training part is as before
    assert (facts.users, facts.exposures, facts.labels[1]) == tuple(counted.values())
    assert facts.items == grown.num_items - 1 > first.num_items - 1
