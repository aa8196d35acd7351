"""An item of the journal after the append that brings it: its own number, the same text, and no line any more."""

from pathlib import Path

import numpy as np
import pytest

from hllm_torchrec.data.new_item_journal import JOURNAL, NewItemJournal
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.serving.scorer import Scorer, UserHistory
from tests.helpers.fixtures import ITEMS
from tests.helpers.growing_shop import LATER, NEW_ITEMS, append_day, prepare_shop
from tests.helpers.training_fixtures import config, train


@pytest.mark.slow
def test_the_item_takes_its_number_when_it_is_appended(tmp_path: Path) -> None:
    root = prepare_shop(tmp_path)
    train(config(tmp_path / "run", data__dataset=root, features__item_id=False, max_steps=2))
    destroy_distributed()
    past, time = UserHistory(1, [1, 2], [5, 6], [1.0, 0.0], [1, 2]), LATER + 10**6
    # Without ID embeddings nothing but text and features counts, before and after.
    texts = {"title": ["word0 word3", "word7"], "brand": ["word1", ""]}
    with Scorer.of_run(tmp_path / "run", "latest", init_distributed()) as noon:
        noon.add_items([f"s{ITEMS}", "other"], texts, {"genres": ["drama", "musical"]})
        assert noon.item_ids([f"s{ITEMS}", "other"]).tolist() == [ITEMS + 1, ITEMS + 2]
        state = noon.read(past)
        before = noon.score(state, [f"s{ITEMS}", "other"], time)
    destroy_distributed()
    dataset = append_day(tmp_path)
    assert dataset.items["raw_item_id"][ITEMS].as_py() == f"s{ITEMS}"
    with Scorer.of_run(tmp_path / "run", "latest", init_distributed()) as night:
        assert len(NewItemJournal(root / JOURNAL).read().items) == 2
        assert night.item_ids([f"s{ITEMS}", "other"]).tolist() == [ITEMS + 1, ITEMS + NEW_ITEMS + 1]
        assert night.num_items == dataset.num_items + 1
        after = night.score(past, [f"s{ITEMS}", "other"], time)
        np.testing.assert_allclose(after[0], before[0], atol=1e-5)
        assert abs(after[0] - after[1]) > 1e-4
        with pytest.raises(ValueError, match="made by another model, or from another dataset"):
            night.score(state, [1], time)  # item numbers behind the old dataset's are others now
