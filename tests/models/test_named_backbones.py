"""The parts of a model that everything loops over, and the messages of building blocks under their fields' names."""

from typing import Any

import pytest
import torch

from hllm_torchrec.config.encoders import UserEncoderConfig
from hllm_torchrec.models.build import build_user_encoder
from hllm_torchrec.models.named_backbones import backbone_sections, text_sections
from tests.helpers import fixtures

HSTU = {"width": 16, "layers": 1, "heads": 2, "max_positions": 3}


@pytest.mark.parametrize(
    ("sections", "names", "backbones", "texts"),
    [
        ({}, ["item_llm", "user"], ["item_llm", "user"], ["item_llm"]),
        ({"item_llm": {"enabled": False}}, ["user"], ["user"], []),
        ({"user": {"encoder": "hstu", "shape": HSTU}}, ["item_llm", "user"], ["item_llm"], ["item_llm"]),
    ],
)
def test_parts_are_those_that_the_model_has(
    sections: dict[str, Any], names: list[str], backbones: list[str], texts: list[str]
) -> None:
    cfg = fixtures.config(**{name: dict(values) for name, values in sections.items()})
    model = fixtures.model(cfg)
    parts = model.named_backbones()
    assert [part.name for part in parts] == names
    assert [part.name for part in parts if part.module.backbone is not None] == backbones
    assert [name for name, _ in backbone_sections(cfg)] == backbones
    assert [name for name, _ in text_sections(cfg)] == texts == [p.name for p in parts if p.module.reads_text]
    keys = model.state_dict().keys()
    for part in parts:
        assert part.module is getattr(model, part.name) and part.section is getattr(cfg, part.name)
        assert any(key.startswith(part.prefix) for key in keys) == (part.name in backbones)
        assert len(part.module.blocks()) == 1 + (part.module.backbone is not None)


def test_learning_rates_are_those_of_the_configuration() -> None:
    cfg = fixtures.config(optim={"item_llm_lr": 0.5, "lr": 0.25})
    assert [part.learning_rate for part in fixtures.model(cfg).named_backbones()] == [0.5, None]
    cfg = fixtures.config(optim={"user_lr": 0.125})
    assert fixtures.model(cfg).named_backbones()[1].learning_rate == 0.125


@pytest.mark.parametrize(
    ("shape", "message"),
    [({"heads": 3}, r"^user\.shape\.heads: 3: does not divide"), ({"preset": "x"}, r"^user\.shape\.preset: 'x': must")],
)
def test_a_wrong_shape_is_told_by_its_field(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_user_encoder(UserEncoderConfig(encoder="hstu", shape={**HSTU, **shape}))


def test_what_a_batch_has_too_much_of_is_told_by_its_field() -> None:
    """Positions of HSTU's table, and the sliding window of the User LLM."""
    mistral = {"model_type": "mistral", "sliding_window": 3}
    cases = {
        r"^user\.shape\.max_positions: 3: a row stands at position": {"user": {"encoder": "hstu", "shape": HSTU}},
        r"^data\.max_history: a sequence has": {"user": {"shape": {**fixtures.USER, **mistral}}},
    }
    for message, sections in cases.items():
        cfg = fixtures.config(**sections)
        batch = fixtures.collator(cfg)(fixtures.pieces(), 0, 0)
        with pytest.raises(ValueError, match=message), torch.no_grad():
            fixtures.model(cfg)(batch)
