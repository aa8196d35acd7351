"""Section of a model card about the Creative LLM: its training texts, its soft tokens, and example code."""

from collections.abc import Mapping
from typing import Any

from hllm_torchrec.config.creative import CreativeConfig
from hllm_torchrec.data.creative_table import CreativeTable
from hllm_torchrec.data.dataset import Dataset

_ORIGINS = {
    "template": "made by a rule from the history, not by people: reproducing them shows that the rule was learned",
    "llm:": "written by a language model and filtered by rules",
    "import:": "imported",
}


def creative_section(section: CreativeConfig, dataset: Dataset) -> str:
    """Markdown about the Creative LLM of a run on `dataset`.

    Raises:
        ValueError: the run's table of texts no longer exists, or is damaged.
    """
    manifest = CreativeTable.open(dataset, section.data).manifest
    rows = {
        "Creative LLM": section.pretrained or "random weights",
        "texts": f"table {section.data}, {_described(manifest)}",
        "prompt": f"`{section.prompt!r}`, at most {section.max_prompt_length} tokens",
        "response": f"at most {section.max_response_length} tokens",
        "soft tokens": f"{section.soft.tokens}, at the place of {{user}}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return _SECTION.format(table=table, usage=_usage(section), most=section.max_response_length)


def _described(manifest: Mapping[str, Any]) -> str:
    writer = str(manifest.get("writer", "unknown"))
    origin = next((text for start, text in _ORIGINS.items() if writer.startswith(start)), "of unknown origin")
    counts = ", ".join(f"{split} {count:,}" for split, count in manifest["counts"].items())
    return f"{origin} (writer {writer}; {counts}; users of one part are in no other)"


def _usage(section: CreativeConfig) -> str:
    if section.soft.hidden or section.soft.normalize != "none":
        return "`SoftPrompt` of hllm_torchrec makes the soft tokens from the weights `creative_head.soft_prompt.*`."
    scaled = 'soft = rms_norm(soft, soft.shape[-1:], eps=1e-6) * parts[f"{name}.gain"]\n'
    return _USAGE.format(tokens=section.soft.tokens, scaled=scaled if section.soft.scale == "words" else "")


_USAGE = """```python
import torch
from safetensors.torch import load_file
from torch.nn.functional import rms_norm
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, writer = AutoTokenizer.from_pretrained("creative_llm"), AutoModelForCausalLM.from_pretrained("creative_llm")
parts, name = load_file("parts.safetensors"), "creative_head.soft_prompt"
# user: a vector of `hllm embed --users`; an unknown user is parts[f"{{name}}.null"] instead of `soft`.
soft = (parts[f"{{name}}.project.weight"] @ user).view({tokens}, -1)
{scaled}# prompt: the prompt above with the item's texts, after the begin token of the tokenizer, if there is one
before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompt.split("{{user}}"))
words = writer.get_input_embeddings()
rows = torch.cat([words(torch.tensor(before).long()), soft, words(torch.tensor(after).long())])
```
"""

_SECTION = """
## Personalized texts

After HLLM-Creator (arXiv 2508.18118): the Creative LLM writes a text for an item and a user, whose vector it reads as
soft tokens. The texts have no guarantee to be true: filter them by the item's facts before anybody reads them, as
`hllm create` does.

| | |
|---|---|
{table}

`hllm creatives evaluate` measures what the user vector is worth, in nats per text against the learned soft tokens of
an unknown user.

{usage}
`writer.generate(inputs_embeds=rows[None], max_new_tokens={most})` then writes the text.
"""
