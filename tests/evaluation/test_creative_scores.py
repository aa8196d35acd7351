"""Statistics that a creative model measures before its training: of the training part only."""

from pathlib import Path

import numpy as np
import pytest

from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.evaluation.creative_scores import likes_by_action
from tests.helpers.source_files import ITEMS, memory_source, random_events


@pytest.mark.parametrize("rule", ["time", "leave_last"])
def test_likes_by_action_do_not_see_labels_of_the_later_parts(rule: str, tmp_path: Path) -> None:
    dataset = Dataset.open(
        prepare(memory_source(tmp_path / "source", random_events(300), ITEMS), tmp_path / "data", split=rule)
    )
    positive, labeled = likes_by_action(dataset, dataset.num_actions)
    manifest = dataset.manifest["counts"]
    every = [dataset.user_events(user) for user in dataset.users["user_id"].to_pylist()]
    train = dataset.sequences(dataset.row_groups("train"))
    assert labeled.sum() == np.count_nonzero(~np.isnan(train.labels)) < manifest["exposures"]
    assert positive.sum() == np.count_nonzero(train.labels > 0.5) < sum((one.labels > 0.5).sum() for one in every)
    assert (positive <= labeled).all() and labeled.shape == (dataset.num_actions,)
