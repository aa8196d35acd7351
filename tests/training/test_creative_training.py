"""Training on creatives: the third LLM in the trainer, ranks, resume, frozen parts."""

from pathlib import Path

from tests.helpers import creative_fixtures, training_fixtures


def test_a_run_with_creatives_trains_and_is_chosen_by_their_likelihood(tmp_path: Path) -> None:
    config = training_fixtures.config(tmp_path, **creative_fixtures.settings())
    trainer = training_fixtures.train(config)
    steps, evaluated = training_fixtures.lines(tmp_path, "step"), training_fixtures.lines(tmp_path, "eval")
    assert steps[-1]["loss_write"] < steps[0]["loss_write"]
    print(steps[-1], evaluated[-1], trainer.metrics)
