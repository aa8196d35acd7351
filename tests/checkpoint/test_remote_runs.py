"""Two ranks whose hosts have no disk in common train into one URL and embed into a store there."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hllm_torchrec.checkpoint import layout as files
from hllm_torchrec.checkpoint.remote_runs import local_run
from hllm_torchrec.common.urls import CACHE, list_files
from hllm_torchrec.config.loading import load_config
from hllm_torchrec.data.remote_datasets import publish_dataset
from hllm_torchrec.distributed.process_group import init_distributed
from hllm_torchrec.evaluation.run_loader import load_run
from hllm_torchrec.inference.item_embedding import embed_items
from hllm_torchrec.store import EmbeddingStore
from tests.helpers import fixtures
from tests.helpers.distributed import run_ranks
from tests.helpers.training_fixtures import arguments, train


def on_a_host_of_its_own(given: list[str], url: str, caches: str) -> dict[str, Any]:
    """Train, and embed with the best checkpoint, with a cache that no other rank sees."""
    own = f"{caches}/host{dist.get_rank()}"
    os.environ |= {CACHE: own, "LOCAL_RANK": "0"}
    trainer = train(load_config(given))
    assert str(trainer.output).startswith(own)
    loaded = load_run(Path(f"{url}/run"), "best", init_distributed())
    with loaded.weights:
        report = embed_items(loaded.experiment, Path(f"{url}/items"))
    drafts = [str(path) for path in Path(own).rglob("step-*.tmp-*")]
    return {
        "step": trainer.step,
        "version": report.version,
        "drafts": drafts,
        "log": (trainer.output / "log.jsonl").exists(),
    }


@pytest.mark.slow
def test_hosts_without_a_common_disk_write_one_run_and_one_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path}/bucket"
    monkeypatch.setenv(CACHE, str(tmp_path / "mine"))
    publish_dataset(fixtures.dataset().root, f"{url}/data")
    given = [o for o in arguments(tmp_path, data__dataset=f"{url}/data") if not o.startswith("--output=")]
    given += [f"--output={url}/run"]
    first, second = run_ranks(on_a_host_of_its_own, 2, given, url, str(tmp_path / "caches"))
    assert first["step"] == second["step"] > 0 and first["version"] == second["version"]
    assert (first["log"], second["log"]) == (True, False) and first["drafts"] == second["drafts"] == []
    for host in ("host0", "host1"):
        assert list((tmp_path / "caches" / host).rglob("tokens/*/store.json")), "each host has tokenised its copy"
    (checkpoint,) = files.checkpoints_by_step(local_run(f"{url}/run", "best") / "checkpoints")
    assert files.find_damage(checkpoint) is None and files.read_marker(checkpoint)["world_size"] == 2
    assert {"extra-rank0.json", "extra-rank1.json"} <= {path.name for path in checkpoint.iterdir()}
    assert {"config.yaml", "log.jsonl"} <= set(list_files(f"{url}/run"))
    store = EmbeddingStore.open(f"{url}/items")
    assert len(store.snapshot()) == len(fixtures.dataset().items) and store.verify() == []
    assert len(store.snapshot().segments) == 2  # one of each host
