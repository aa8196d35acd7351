"""Iteration over the large parts of a model (Item, User and Creative LLM), for code that treats them uniformly.

The name of a part is used for its section of the configuration, its attribute of `HLLM`, its learning rate
(`optim.<name>_lr`) and the prefix of its parameter names in a checkpoint. To add an LLM, add a section to
`LLM_SECTIONS` and an attribute to `HLLM`: optimizer, averages, adapters, export, log and plan loop over
`HLLM.named_backbones()`, or over the sections before a model is built.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from hllm_torchrec.config.creative import CreativeConfig
from hllm_torchrec.config.encoders import ItemLLMConfig, UserEncoderConfig
from hllm_torchrec.config.rules import LLM_SECTIONS
from hllm_torchrec.config.schema import Config
from hllm_torchrec.modules.creative.creative_llm import CreativeLLM
from hllm_torchrec.modules.encoders.base import UserEncoder
from hllm_torchrec.modules.encoders.item_llm import ItemLLM

Section = ItemLLMConfig | UserEncoderConfig | CreativeConfig


@dataclass(frozen=True)
class NamedBackbone:
    """A large part of a model. learning_rate: None: the learning rate of the other dense parts."""

    name: str
    module: ItemLLM | UserEncoder | CreativeLLM
    section: Section
    learning_rate: float | None

    @property
    def prefix(self) -> str:
        """Prefix of the parameter names of the Hugging Face model."""
        return backbone_prefix(self.name)

    @property
    def title(self) -> str:
        """Name in the output of `hllm plan`: item, user, creative."""
        return self.name.removesuffix("_llm")


def backbone_sections(config: Config) -> Iterator[tuple[str, Section]]:
    """Yield (name, section) of the parts that are Hugging Face models, without building them."""
    for name in LLM_SECTIONS:
        section = getattr(config, name)
        if section.has_backbone:
            yield name, section


def text_sections(config: Config) -> Iterator[tuple[str, ItemLLMConfig]]:
    """Yield (name, section) of the LLMs that encode the texts of items."""
    for name, section in backbone_sections(config):
        if isinstance(section, ItemLLMConfig):
            yield name, section


def backbone_prefix(name: str) -> str:
    """Prefix of the parameter names of a part's Hugging Face model."""
    return f"{name}.backbone."
