"""The Creative LLM as a configuration builds it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hllm_torchrec.config.creative import CreativeConfig
from hllm_torchrec.models.backbones import backbone_config
from hllm_torchrec.models.build import build_creative_llm
from tests.helpers import fixtures


@pytest.mark.parametrize(("layers", "share"), [(None, 1.0), (1, 0.5), (2, 1.0)])
def test_the_last_norm_of_a_truncated_model_is_scaled_by_the_share_of_its_layers(
    tmp_path: Path, layers: int | None, share: float
) -> None:
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(backbone_config(None, {**fixtures.LLAMA, "num_hidden_layers": 2}))
    whole.save_pretrained(tmp_path)
    model = build_creative_llm(CreativeConfig(enabled=True, pretrained=str(tmp_path), layers=layers))
    assert model is not None and len(model.blocks()) == (layers or 2)
    torch.testing.assert_close(model.backbone.norm.weight, whole.model.norm.weight * share)
