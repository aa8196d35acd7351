"""The ablation's variants are configurations that can be trained, and its questions pair variants that there are."""

from types import ModuleType

import pytest

from hllm_torchrec.config.loading import load_config
from tests.helpers.scripts import bench_module


@pytest.fixture
def ablation() -> ModuleType:
    return bench_module("ablation")


def test_every_variant_is_a_configuration_of_its_own(ablation: ModuleType) -> None:
    names = ablation.every_variant()
    found = [load_config(ablation.configuration(name)) for name in names]
    described = {repr(config).replace(config.output, "") for config in found}
    assert len(described) == len(names) == len(set(names))


def test_a_suffix_adds_to_the_variant_before_it(ablation: ModuleType) -> None:
    both = load_config(ablation.configuration("trained_quarter_generative"))
    assert (both.item_llm.trained_share, both.objective.generative_weight) == (0.25, 0.1)
    assert both.evaluation.retrieval and both.stages == load_config(ablation.configuration("trained")).stages


def test_questions_pair_variants_that_there_are(ablation: ModuleType) -> None:
    asked = {name for pair in ablation.QUESTIONS.values() for name in pair}
    assert asked <= set(ablation.every_variant())
