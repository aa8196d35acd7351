"""Training on creatives: the third LLM in the trainer, on ranks, resumed, frozen, and what it learns."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.data.events import Events
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.evaluation.creative_scores import creative_vectors, measure_user_vectors, score_creatives
from hllm_torchrec.evaluation.run_loader import load_run
from hllm_torchrec.inference.user_embedder import open_embedder
from hllm_torchrec.modules.lora import is_adapter
from hllm_torchrec.training.trainer_setup import build_trainer
from tests.helpers import creative_fixtures, fixtures
from tests.helpers.distributed import run_ranks
from tests.helpers.training_fixtures import assert_equal_weights, config, interrupted, lines, losses, train, weights

WITHOUT_CHANCE: dict[str, Any] = {"creative__soft__dropout": "0", "creative__losses__match": "0"}


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def settings(**more: Any) -> dict[str, Any]:
    return creative_fixtures.settings(**more)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    """The run uses soft dropout and sampled items; its best checkpoint has the best likelihood."""
    own = settings(
        evaluation__checkpoint_every=2,
        evaluation__keep_last=9,
        optim__ema=0.9,
        creative__soft__normalize="whiten",
        creative__soft__text_decay=0.9,
    )
    whole = train(config(tmp_path / "whole", **own))
    steps = lines(tmp_path / "whole", "step")
    assert steps[-1]["loss_write"] < steps[0]["loss_write"] and steps[0]["loss_match"] > 0
    assert "loss_cls" not in steps[0] and 0 < steps[0]["user_similarity"] <= 1
    resumed = train(config(interrupted(tmp_path / "whole", tmp_path / "again", 2), resume=True, **own))
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    assert resumed.metrics == whole.metrics
    assert_equal_weights(weights(resumed), weights(whole))
    found = whole.metrics
    assert found["creative_gap"] == pytest.approx(found["creative_nll_null"] - found["creative_nll"])
    assert whole.early_stopping.best == -found["creative_nll"]
    # A run that is loaded gives the same likelihoods.
    loaded = load_run(tmp_path / "whole", "best", init_distributed())
    with loaded.weights:
        scores = score_creatives(loaded.experiment, "valid")
    assert float(scores.nll["right"].mean()) == pytest.approx(found["creative_nll"], rel=1e-6)
    parts = weights(whole).keys()
    assert any(name.startswith("creative.backbone.layers.1.") for name in parts)
    assert any(name.startswith("creative_head.match.") for name in parts)


def trained_losses(output: str, given: str) -> list[tuple[float, ...]]:
    train(config(Path(output), **json.loads(given)))
    names = ("loss_write", "loss_recon", "loss_align", "align_negatives", "grad_norm")
    return [tuple(line[name] for name in names) for line in lines(Path(output), "step")]


@pytest.mark.slow
@pytest.mark.parametrize("dense", ["ddp", "fsdp"])
def test_two_ranks_equal_one(tmp_path: Path, dense: str) -> None:
    """Includes losses that compare users with those of the other rank, and statistics over all users."""
    losses = {"creative__losses__recon": "0.5", "creative__losses__align": "0.5", "creative__soft__normalize": "whiten"}
    own = settings(**WITHOUT_CHANCE, **losses)
    own = {name: str(value) if isinstance(value, Path) else value for name, value in own.items()}
    one = trained_losses(str(tmp_path / "one"), json.dumps(own))
    # The same global batch; in the last steps a rank may have no creatives.
    two = run_ranks(
        trained_losses, 2, str(tmp_path / "two"), json.dumps(own | {"creative__per_batch": 4, "parallel__dense": dense})
    )
    np.testing.assert_allclose(two[0], one, rtol=2e-4)


def test_only_what_is_trainable_moves(tmp_path: Path) -> None:
    """First only the soft prompt is trained, then also adapters of the Creative LLM."""
    frozen = {"creative__trainable": "false", "item_llm__trainable": "false", "user__trainable": "false"}
    for extra, moves in (
        (frozen, ()),
        ({**frozen, "creative__trainable": "true", "creative__lora__rank": 2}, ("creative.backbone.",)),
    ):
        trainer = build_trainer(
            config(tmp_path / str(len(moves)), max_steps=2, **settings(**extra)), init_distributed()
        )
        before = {name: p.detach().clone() for name, p in trainer.hllm.named_parameters()}
        trainer.run()
        for name, parameter in trainer.hllm.named_parameters():
            if name.startswith(("creative", "item_llm.", "user.", "head.")):
                may = name.startswith("creative_head.") or (name.startswith(moves) and is_adapter(name))
                assert may or torch.equal(before[name], parameter), name
        changed = {
            name.split(".")[0] for name, p in trainer.hllm.named_parameters() if not torch.equal(before[name], p)
        }
        assert {"creative_head", *(["creative"] if moves else [])} <= changed


def test_in_a_stage_of_the_writer_alone_nothing_else_moves(tmp_path: Path) -> None:
    """The comparison includes the embedding tables."""
    stages = [{"name": "alone", "epochs": 0.5, "item_embeddings": "cached", "trains": "creative"}]
    trainer = build_trainer(config(tmp_path, **settings(stages=stages)), init_distributed())
    before = {name: _whole(x).clone() for name, x in trainer.experiment.model_state().items()}
    trainer.run()
    after = trainer.experiment.model_state()
    moved = {name.split(".")[0] for name, x in before.items() if not torch.equal(x, _whole(after[name]))}
    assert moved == {"creative", "creative_head"}
    with pytest.raises(ConfigError, match="trains 'creative' with creative.enabled false"):
        config(tmp_path, stages=stages)


def _whole(x: Any) -> torch.Tensor:
    """Return the concatenated shards of a table, or the tensor itself."""
    shards = x.local_shards() if hasattr(x, "local_shards") else None
    return x if shards is None else torch.cat([shard.tensor for shard in shards])


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_user_vector_reads_strictly_earlier_events_only(tmp_path: Path, decay: float) -> None:
    """A creative sees the user's events of earlier seconds, but none of its own second or later, or of other users."""
    trainer = build_trainer(config(tmp_path, **settings(creative__soft__text_decay=decay)), init_distributed())
    measure_user_vectors(trainer.experiment)
    known = creative_vectors(trainer.experiment, "test")
    loader = known.loader
    hllm = trainer.hllm.eval()
    width = hllm.user.width + (hllm.item_llm.width if decay else 0)
    assert known.vectors.shape[1] == hllm.user_vector_width == width
    with open_embedder(trainer.experiment) as embed:  # as `hllm embed --users`
        vectors, has = embed(fixtures.pieces()[:3])
    assert vectors.shape[1] == width and vectors[has].isfinite().all() and has.any()
    with torch.no_grad():
        for one in loader.passes:
            events, seconds = loader.dataset.user_events(int(known.user_ids[one[0]])), loader.seconds(one)
            window = loader._piece(one)
            for n, second in zip(one, seconds, strict=True):
                seen = int((events.timestamps < second).sum())
                assert bool(known.known[n]) == (seen > 0)
                # Alone, with nothing of the pass but what it may see.
                alone = dataclasses.replace(
                    window,
                    **events[window.offset : seen].columns,
                    first_target=seen - window.offset,
                    requests=Events.at([second], item_ids=[int(loader.part.item_ids[loader.tokens.rows[n]])]),
                )
                assert len(alone) >= min(seen, loader.spec.max_history // 2)
                batch = loader.collator([alone], 0, 0)
                found = hllm.embed_users(batch)[batch.request_query]
                torch.testing.assert_close(found[0], known.vectors[n], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("table", ["countries", "random"])
def test_the_user_is_worth_something_if_and_only_if_texts_depend_on_it(tmp_path: Path, table: str) -> None:
    """Texts name the user's country, or a random country; the users were not in training."""
    creative_fixtures.country_table(table)
    own = settings(
        creative__data=table,
        creative__losses__match="0",
        creative__prompt="{user} for",
        optim__lr=0.003,
        features__time_depth=0,
        creative__per_batch=16,
        stages=[{"name": "writer", "epochs": 4, "item_embeddings": "cached"}],
        evaluation__every=4,
    )
    trainer = train(config(tmp_path, **own))
    scores = score_creatives(trainer.experiment, "test")
    gap = scores.nll["null"] - scores.nll["right"]

    error = gap.std() / gap.size**0.5
    if table == "countries":
        assert gap.mean() > 3 * error and scores.nll["shuffled"].mean() > scores.nll["right"].mean()
    else:
        assert gap.mean() < 3 * error


# --- the user's part in the losses ---------------------------------------------------------------------------


def a_batch(tmp_path: Path, **more: Any) -> tuple[Any, Any]:
    """Return (model in evaluation mode, batch of creatives of the training part), with whitened user vectors."""
    own = settings(**WITHOUT_CHANCE, creative__soft__normalize="whiten", **more)
    trainer = build_trainer(config(tmp_path, **own), init_distributed())
    measure_user_vectors(trainer.experiment)
    return trainer.hllm.eval(), next(trainer.experiment.creative_loader("train", 8, training=True).batches(0))


def test_gradients_reach_the_history_and_equal_finite_differences(tmp_path: Path) -> None:
    hllm, batch = a_batch(tmp_path, creative__losses__recon="0.5", creative__losses__align="0.5")
    items = hllm.item_embeddings(batch.unique_items).detach()
    direction = torch.randn(items.shape, generator=torch.Generator().manual_seed(0))

    def losses(step: float) -> torch.Tensor:
        moved = (items + step * direction).requires_grad_()
        hllm.item_source = lambda _: moved
        found = hllm(batch).creative
        sums = torch.stack([found.write, found.recon, found.align])
        if step:
            return sums.detach().double()
        return torch.stack([(torch.autograd.grad(x, moved, retain_graph=True)[0] * direction).sum() for x in sums])

    step = 0.01
    slopes, expected = losses(0.0), (losses(step) - losses(-step)) / (2 * step)
    assert (slopes.abs() > 1e-3).all()
    torch.testing.assert_close(slopes.double(), expected, rtol=0.02, atol=0.002)


def test_without_users_the_loss_is_the_same_for_all_of_them(tmp_path: Path) -> None:
    """Soft dropout of 1 hides the user in training only; if all users have equal vectors, shuffling changes nothing."""
    hllm, batch = a_batch(tmp_path)
    head, llm = hllm.creative_head, hllm.creative
    users = torch.randn(batch.query_times.numel(), hllm.user_vector_width)
    head.section = dataclasses.replace(head.section, soft=dataclasses.replace(head.section.soft, dropout=1.0))
    for training, same in ((True, True), (False, False)):
        head.train(training)
        one, two = (head(llm, given, None, batch).write for given in (users, users.flip(0)))
        assert bool(torch.isclose(one, two, rtol=1e-6)) == same
    equal = users[:1].expand_as(users)
    assert head(llm, equal, None, batch).write == head(llm, equal.flip(0), None, batch).write


def test_what_all_users_have_in_common_does_not_matter_in_training(tmp_path: Path) -> None:
    """The common part is subtracted, its gradient is 0, and the running mean follows it."""
    hllm, batch = a_batch(tmp_path, creative__losses__recon="0.5", creative__losses__align="0.5")
    head, llm = hllm.creative_head.train(), hllm.creative
    head.section = dataclasses.replace(head.section, soft=dataclasses.replace(head.section.soft, dropout=0.0))
    users = torch.randn(batch.query_times.numel(), hllm.user_vector_width)
    shift = torch.zeros(hllm.user_vector_width, requires_grad=True)
    losses = [head(llm, given, None, batch) for given in (users, users + 3 + shift)]
    torch.testing.assert_close(losses[1].write, losses[0].write, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses[1].recon, losses[0].recon, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses[1].align, losses[0].align, rtol=1e-4, atol=1e-4)
    [slope] = torch.autograd.grad(losses[1].write + losses[1].align, shift)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-3)
    means = []
    for _ in range(60):
        head(llm, users + 3, None, batch)
        means.append(head.soft_prompt.normalize.mean.clone())
    known = users[batch.request_query][batch.query_visible[batch.request_query] > 0] + 3
    torch.testing.assert_close(means[-1], known.mean(0), rtol=0.05, atol=0.05)


def test_profiles_that_are_read_must_exist_and_have_somebody_to_be_told_apart_from(tmp_path: Path) -> None:
    creative_fixtures.country_table("countries")
    own = settings(creative__losses__match="0", creative__losses__align="1")
    with pytest.raises(ConfigError, match=r"recon and align read profiles, and \d+ training rows of .* have none"):
        build_trainer(config(tmp_path / "a", **own | {"creative__data": "countries"}), init_distributed())
    with pytest.raises(FloatingPointError, match="of one user, so there are no negatives; raise"):
        build_trainer(config(tmp_path / "b", **own | {"creative__per_batch": 1}), init_distributed()).run()


def test_the_last_user_of_an_epoch_is_not_alone_in_a_step(tmp_path: Path) -> None:
    own = settings(creative__losses__match="0", creative__losses__align="1")
    experiment = build_trainer(config(tmp_path, **own), init_distributed()).experiment
    merged = 0
    for per_batch in range(5, 12):
        told_apart = experiment.creative_loader("train", per_batch, training=True)
        plan = told_apart._plan(0)
        assert all(told_apart._users_of(passes).size > 1 for [passes] in plan[-2:])
        assert sum(passes.size for [passes] in plan) == len(told_apart.passes)
        told_apart.never_alone = False
        merged += len(told_apart._plan(0)) - len(plan)
    assert merged  # otherwise nothing was tested
