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
from hllm_torchrec.training.trainer_setup import build_trainer
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
        weight, decay = similarity.log_weight.exp() ** 2, similarity.decay_logit.sigmoid()
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
    assert seen.any() and abs(weight - 0.5) > 1e-4, "the weight was trained"
    torch.testing.assert_close(found[seen], wanted[seen], atol=1e-5, rtol=1e-4)
    assert hllm.user_vector_width == joined.shape[1]
    torch.testing.assert_close(hllm.embed_users(batch), joined)


def test_cached_and_live_embeddings_give_the_same_loss(tmp_path: Path, trainer: Trainer) -> None:
    live = build_trainer(config(tmp_path / "live", stages=[{"name": "live", "epochs": 1}]), init_distributed())
    live.experiment.measure_item_statistics()
    live.hllm.eval()
    batch = next(iter(live.experiment.loader("train", 8, training=True).batches(0)))
    with torch.no_grad():
        one = live.hllm(batch).generative.loss_sum
        live.experiment.use_cached_items()
        torch.testing.assert_close(live.hllm(batch).generative.loss_sum, one)
        # What was computed for the catalogue follows the statistics.
        live.hllm.standardise.mean.add_(1.0)
        cached = live.hllm(batch).generative.loss_sum
        live.experiment.use_live_items()
        torch.testing.assert_close(live.hllm(batch).generative.loss_sum, cached)
    assert not torch.allclose(one, cached)


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
