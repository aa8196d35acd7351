"""A model with `objective.transitions` scores by its cosine plus the transitions of the history, wherever it ranks."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.transitions import FILE, Transitions
from hllm_torchrec.distributed.process_group import init_distributed
from hllm_torchrec.evaluation.catalogue_retrieval import catalogue_vectors
from hllm_torchrec.evaluation.run_loader import load_run
from hllm_torchrec.training.trainer import Trainer
from tests.helpers import fixtures
from tests.helpers.training_fixtures import config as tiny
from tests.helpers.training_fixtures import train


def config(output: Path, **more: Any) -> Config:
    return tiny(
        output,
        **{
            "data__dataset": fixtures.dataset("leave_one_out").root,
            "data__user_features": [],
            "data__numeric_features": [],
            "item_llm__enabled": False,
            "item_llm__shape": None,
            "item_llm__tokenizer": None,
            "objective__fusion": "none",
            "objective__item_space": "features",
            "objective__positive_targets_only": False,
            "objective__transitions": 0.4,
            "max_steps": 2,
            **more,
        },
    )


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return train(config(tmp_path_factory.mktemp("transitions") / "run"))


def test_scores_are_the_cosine_and_the_transitions_of_the_visible_history(trainer: Trainer) -> None:
    experiment, hllm = trainer.experiment, trainer.hllm
    hllm.eval()
    batch = next(iter(experiment.loader("test", 8).batches(0)))
    fitted = Transitions.load(Path(experiment.config.output))
    assert fitted is not None
    with torch.no_grad():
        joined, items = hllm(batch, want_next=True).next_items, catalogue_vectors(experiment)
        assert joined is not None and joined.shape[1] == items.shape[1] == hllm.user_vector_width
        torch.testing.assert_close(hllm.embed_users(batch), joined)
        similarity, hllm.transitions = hllm.transitions, None
        learned = F.normalize(hllm(batch, want_next=True).next_items, dim=-1)
        wanted = learned @ F.normalize(catalogue_vectors(experiment), dim=-1).T
        hllm.transitions = similarity
    pieces = torch.repeat_interleave(torch.arange(batch.user_ids.numel()), batch.query_offsets.diff())
    source, target = torch.from_numpy(fitted.source), torch.from_numpy(fitted.target[:, :-1])
    for row, (user, visible) in enumerate(zip(pieces.tolist(), batch.query_visible.tolist(), strict=True)):
        history = batch.item_ids[batch.seq_offsets[user] :][:visible]
        weights = 0.7 ** torch.arange(visible - 1, -1, -1)
        wanted[row] += 0.4 * target @ (weights @ source[history])
    seen = batch.query_visible > 0
    assert seen.any() and (wanted[seen].std(1) > 0).all()
    torch.testing.assert_close((joined @ items.T)[seen], wanted[seen], atol=1e-5, rtol=1e-4)
    lengths = items.norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand_as(lengths))


def test_training_is_that_of_the_model_without(tmp_path: Path, trainer: Trainer) -> None:
    without = train(config(tmp_path / "without", objective__transitions=0))
    theirs, ours = without.experiment.model.state_dict(), trainer.experiment.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith("user."))
    assert not (tmp_path / "without" / FILE).exists()


def test_a_run_is_read_with_its_own_and_one_that_starts_from_it_fits_anew(tmp_path: Path, trainer: Trainer) -> None:
    run = tmp_path / "run"
    shutil.copytree(Path(trainer.experiment.config.output), run)
    loaded = load_run(run, "latest", init_distributed()).experiment
    assert loaded.transitions is not None and loaded.hllm.transitions is not None
    assert torch.equal(loaded.hllm.transitions.source, trainer.hllm.transitions.source)
    loaded.transitions.without(torch.tensor([1, 2, 3]).numpy()).save(run)
    with pytest.raises(ValueError, match="was saved with other transitions than the run's transitions.npz: restore"):
        load_run(run, "latest", init_distributed())
    later = train(config(tmp_path / "later", start_from=run))
    assert later.experiment.transitions is not None
    assert later.experiment.transitions.fingerprint == trainer.experiment.transitions.fingerprint
    (run / FILE).unlink()
    with pytest.raises(ValueError, match="transitions.npz: no such file, but objective.transitions is 0.4: restore"):
        load_run(run, "latest", init_distributed())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"objective__fusion": "early"}, "objective.transitions: 0.4: needs objective.item_space features"),
        ({"user__actions": "interleaved", "features__action": True}, "objective.transitions: action tokens are no"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **more)
