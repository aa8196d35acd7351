"""Sources of item embeddings, and who of them is the model's."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.models.assembly import build_experiment
from hllm_torchrec.models.item_source import CachedItems, LiveItems, StoredItems
from tests.helpers.training_fixtures import config


@pytest.fixture
def device() -> Iterator[torch.device]:
    yield init_distributed()
    destroy_distributed()


def test_an_adapter_stands_on_top_of_stored_items_alone() -> None:
    table, adapter = nn.Embedding(4, 3), nn.Linear(3, 3)
    ids = torch.tensor([2, 0])
    stored = StoredItems(table, adapter)
    torch.testing.assert_close(stored(ids), adapter(table.weight[ids]))
    torch.testing.assert_close(stored.raw(ids), table.weight[ids])
    torch.testing.assert_close(StoredItems(table)(ids), table.weight[ids])
    torch.testing.assert_close(CachedItems(table.weight)(ids), table.weight[ids])


def test_an_evaluation_reads_a_cache_and_gives_the_source_back(device: torch.device, tmp_path: Path) -> None:
    experiment = build_experiment(config(tmp_path), device)
    hllm, ids = experiment.hllm.eval(), torch.tensor([3, 1])
    assert isinstance(hllm.item_source, LiveItems) and hllm.item_source is experiment.live_items
    assert hllm.encodes_items
    live = hllm.item_embeddings(ids)
    assert live.requires_grad
    with pytest.raises(ZeroDivisionError), experiment.evaluation_items():
        cache = hllm.item_source
        assert isinstance(cache, CachedItems) and not hllm.encodes_items
        torch.testing.assert_close(hllm.item_embeddings(ids), live.detach(), atol=1e-6, rtol=0)
        with experiment.evaluation_items():
            assert hllm.item_source is cache  # the catalogue is encoded once
        raise ZeroDivisionError
    assert hllm.item_source is experiment.live_items


def test_a_stage_has_the_items_that_it_asks_for(device: torch.device, tmp_path: Path) -> None:
    experiment = build_experiment(config(tmp_path), device)
    experiment.use_cached_items()
    assert isinstance(experiment.hllm.item_source, CachedItems)
    experiment.use_live_items()
    assert experiment.hllm.item_source is experiment.live_items
    stored = experiment.hllm.item_source = StoredItems(nn.Embedding(4, 3))
    experiment.use_live_items()
    with experiment.evaluation_items():
        assert experiment.hllm.item_source is stored


def test_a_model_of_ids_has_no_source(device: torch.device, tmp_path: Path) -> None:
    experiment = build_experiment(config(tmp_path, item_llm__enabled=False), device)
    assert experiment.live_items is None and experiment.hllm.encodes_items
    with experiment.evaluation_items():
        assert experiment.hllm.item_source is None
    with pytest.raises(AssertionError, match="an ID-only model has no item embeddings"):
        experiment.hllm.embed_items(torch.tensor([1]))
