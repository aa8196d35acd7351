"""A model with `objective.text_similarity` scores by the learned cosine plus that of the texts, in all its outputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hllm_torchrec.config.loading import load_config
from hllm_torchrec.config.schema import Config
from hllm_torchrec.distributed.process_group import init_distributed
from hllm_torchrec.evaluation.catalogue_retrieval import catalogue_vectors
from hllm_torchrec.training.trainer import Trainer
from tests.helpers import fixtures
from tests.helpers.training_fixtures import arguments, train

CACHED = [{"name": "cached", "epochs": 1, "item_embeddings": "cached"}]


def config(output: Path, **more: Any) -> Config:
    return load_config(
        arguments(
            output,
            **{
                "data__dataset": fixtures.dataset("leave_one_out").root,
                "data__user_features": [],
                "data__numeric_features": [],
                "item_llm__whiten": True,
                "objective__fusion": "none",
                "objective__item_space": "features",
                "objective__positive_targets_only": False,
                "objective__text_similarity": 0.5,
                "stages": CACHED,
                "optim__lr": 0.05,
                "max_steps": 3,
                **more,
            },
        )
    )


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return train(config(tmp_path_factory.mktemp("text") / "run"))


def test_evaluation_scores_are_the_weighted_mean_of_both_cosines(trainer: Trainer) -> None:
    init_distributed()
    experiment, hllm = trainer.experiment, trainer.hllm
    hllm.eval()
    batch = next(iter(experiment.loader("test", 8).batches(0)))
    with torch.no_grad():
        experiment.use_cached_items()
        joined = hllm(batch, want_next=True).next_items
        items = catalogue_vectors(experiment)
        similarity, hllm.text_similarity = hllm.text_similarity, None
        learned = F.normalize(hllm(batch, want_next=True).next_items, dim=-1)
        learned_items = F.normalize(catalogue_vectors(experiment), dim=-1)
        hllm.text_similarity = similarity
        texts = F.normalize(hllm.standardise(experiment.encode_catalogue()), dim=-1)
        weight, decay = similarity.weight, similarity.decay
        rows = []
        pieces = torch.repeat_interleave(torch.arange(batch.user_ids.numel()), batch.query_offsets.diff())
        for user, visible in zip(pieces.tolist(), batch.query_visible.tolist(), strict=True):
            history = batch.item_ids[batch.seq_offsets[user] :][:visible]
            ages = torch.arange(visible - 1, -1, -1)
            rows.append((texts[history] * (decay**ages)[:, None]).sum(0))
        of_texts = F.normalize(torch.stack(rows), dim=-1) @ texts.T
    wanted = (learned @ learned_items.T + weight * of_texts) / (1 + weight)
    found = F.normalize(joined, dim=-1) @ F.normalize(items, dim=-1).T
    assert torch.equal(batch.target_query, torch.arange(pieces.numel()))
    seen = batch.query_visible > 0
    assert seen.any()
    torch.testing.assert_close(found[seen], wanted[seen], atol=1e-5, rtol=1e-4)
    assert hllm.user_vector_width == joined.shape[1]
    torch.testing.assert_close(hllm.embed_users(batch), joined)


def test_training_is_that_of_the_model_without_it(tmp_path: Path, trainer: Trainer) -> None:
    without = train(config(tmp_path / "without", objective__text_similarity=0))
    theirs = without.experiment.model.state_dict()
    ours = trainer.experiment.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith(("user.", "project_item.")))


def test_live_embeddings_give_the_user_vectors_of_cached_ones_and_follow_the_statistics(trainer: Trainer) -> None:
    init_distributed()
    experiment, hllm = trainer.experiment, trainer.hllm
    hllm.eval()
    batch = next(iter(experiment.loader("test", 8).batches(0)))
    with torch.no_grad():
        experiment.use_cached_items()
        before = hllm.embed_users(batch)
        experiment.use_live_items()
        torch.testing.assert_close(hllm.embed_users(batch), before)
        experiment.use_cached_items()
        hllm.embed_users(batch)
        hllm.standardise.mean.add_(1.0)  # what was computed for the catalogue follows the statistics
        cached = hllm.embed_users(batch)
        experiment.use_live_items()
        torch.testing.assert_close(hllm.embed_users(batch), cached)
        hllm.standardise.mean.sub_(1.0)
    assert not torch.allclose(before, cached)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"objective__item_space": "text"}, "objective.text_similarity: 0.5: needs an Item LLM, objective.item_space"),
        (
            {"user__actions": "interleaved", "features__action": True},
            "objective.text_similarity: action tokens have no",
        ),
        ({"item_llm__standardise": True}, "item_llm.standardise: true with item_llm.whiten"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **more)
