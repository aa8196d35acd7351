"""The configurations of the retrieval table: they build, share what makes them comparable, and have the sizes named."""

from pathlib import Path

import pytest
import torch

from hllm_torchrec.config.loading import load_config
from hllm_torchrec.config.schema import Config
from hllm_torchrec.models.assembly import batch_spec_of
from hllm_torchrec.models.build import build_model
from tests.helpers.fixtures import dataset

RETRIEVAL = sorted((Path(__file__).parents[2] / "configs" / "retrieval").glob("*.yaml"))
TABLE = [path for path in RETRIEVAL if not path.stem.startswith(("pixel8m", "ml1m"))]
ITEM_LLM = "{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, \
num_attention_heads: 2, vocab_size: 9}"
PARAMETERS = {"pixel8m_hstu_1b": 462e6, "pixel8m_sasrec_1b": 969e6}


def load(path: Path) -> Config:
    """The configuration, with a shape in the place of weights that are not here."""
    given = ["--config", str(path)]
    if load_config(given).item_llm.pretrained is None:
        return load_config(given)
    return load_config([*given, "--item_llm.pretrained", "null", "--item_llm.shape", ITEM_LLM])


@pytest.mark.parametrize("path", RETRIEVAL, ids=lambda path: path.stem)
def test_every_model_builds_on_the_meta_device(path: Path) -> None:
    config = load(path)
    tables = batch_spec_of(config, dataset("leave_one_out")).tables(dataset("leave_one_out"))
    with torch.device("meta"):
        model = build_model(config, tables, base_rate=0.5)
    assert all(p.is_meta for p in model.parameters())
    assert model.compares_features == (config.objective.item_space == "features" or not config.item_llm.enabled)
    if path.stem in PARAMETERS:
        count = sum(p.numel() for p in model.user.parameters())
        assert count == pytest.approx(PARAMETERS[path.stem], rel=0.01)


@pytest.mark.slow
def test_the_models_of_the_table_share_data_negatives_loss_and_protocol() -> None:
    configs = [load(path) for path in TABLE]
    assert len(configs) >= 11
    for name in ("dataset", "history", "max_history", "batch_users", "train_part"):
        assert len({getattr(config.data, name) for config in configs}) == 1, name
    for name in ("fusion", "negatives", "temperature", "positive_targets_only", "generative_loss"):
        assert len({getattr(config.objective, name) for config in configs}) == 1, name
    for name in ("protocol", "filter_seen", "ks", "patience"):
        assert len({getattr(config.evaluation, name) for config in configs}) == 1, name
    assert configs[0].evaluation.protocol == "leave_one_out"
