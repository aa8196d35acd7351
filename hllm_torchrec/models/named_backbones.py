"""Item LLM and user encoder one after the other, for what treats the large parts of a model alike.

A part's name is that of its section of the configuration, of its attribute of `HLLM`, of its learning rate
(`optim.<name>_lr`) and of the beginning of its weights' names in a checkpoint. So a further LLM is a section of
`LLM_SECTIONS` and an attribute of `HLLM`: optimizer, averages, adapters, export, log and plan loop over
`HLLM.named_backbones()`, or over the sections where there is no model yet.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from hllm_torchrec.config.rules import LLM_SECTIONS
from hllm_torchrec.config.schema import Config, ItemLLMConfig, UserEncoderConfig
from hllm_torchrec.modules.encoders.base import UserEncoder
from hllm_torchrec.modules.encoders.item_llm import ItemLLM

Section = ItemLLMConfig | UserEncoderConfig


@dataclass(frozen=True)
class NamedBackbone:
    """A large part of a model. learning_rate: None: that of the other dense parts."""

    name: str
    module: ItemLLM | UserEncoder
    section: Section
    learning_rate: float | None

    @property
    def prefix(self) -> str:
        """Beginning of the names of the Hugging Face model's weights in the model."""
        return backbone_prefix(self.name)

    @property
    def title(self) -> str:
        """Name in figures of a plan: item, user."""
        return self.name.removesuffix("_llm")


def backbone_sections(config: Config) -> Iterator[tuple[str, Section]]:
    """(name, section) of the parts that are Hugging Face models, without building them."""
    for name in LLM_SECTIONS:
        section = getattr(config, name)
        if section.has_backbone:
            yield name, section


def text_sections(config: Config) -> Iterator[tuple[str, ItemLLMConfig]]:
    """(name, section) of the parts that read text."""
    for name, section in backbone_sections(config):
        if isinstance(section, ItemLLMConfig):
            yield name, section


def backbone_prefix(name: str) -> str:
    """Beginning of the names of a part's Hugging Face weights in the model."""
    return f"{name}.backbone."
