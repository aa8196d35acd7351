"""Tiny training runs: command-line settings on the generated shop, and what a run left behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from hllm_torchrec.checkpoint.layout import checkpoints_by_step
from hllm_torchrec.common.run_log import read_log
from hllm_torchrec.config.loading import load_config
from hllm_torchrec.config.schema import Config
from hllm_torchrec.distributed.process_group import init_distributed
from hllm_torchrec.training.trainer import Trainer
from hllm_torchrec.training.trainer_setup import build_trainer
from tests.helpers import fixtures

ITEM_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}
USER_LLAMA: dict[str, Any] = {**ITEM_LLAMA, "hidden_size": 24, "num_hidden_layers": 1, "vocab_size": 3}
MIXED = [
    {"name": "live", "epochs": 0.4},
    {"name": "stored", "epochs": 1.3, "item_embeddings": "cached"},
    {"name": "live again", "epochs": 0.3},
]
"""Stages that train the Item LLM, then use stored embeddings for more than one epoch, then train it again."""


def arguments(output: Path, **settings: Any) -> list[str]:
    """Options of `train.py` for a tiny run; `a__b=1` stands for `--a.b 1`."""
    defaults = {
        "output": output,
        "data__dataset": fixtures.dataset().root,
        "data__batch_users": 4,
        "data__max_history": 32,
        "data__item_features": ["genres"],
        "data__user_features": ["country"],
        "data__numeric_features": ["user_mean"],
        "item_llm__shape": ITEM_LLAMA,
        "item_llm__tokenizer": fixtures.tokenizer_dir(),
        "item_llm__text_keys": ["title", "brand"],
        "item_llm__max_text_length": 12,
        "user__shape": USER_LLAMA,
        "features__time_width": 4,
        "features__shard_from_rows": 30,  # items and years are sharded, the other tables are replicated
        "objective__negatives": 8,
        "objective__head_hidden": 8,
        "objective__collapse_above": 1,  # tiny untrained LLMs see little difference between items
        "stages": [{"name": "only", "epochs": 1}],
        "optim__lr": 0.01,
        "optim__item_llm_lr": 0.01,
        "evaluation__batch_users": 8,
    }
    return [
        f"--{name.replace('__', '.')}={value if isinstance(value, str | Path) else json.dumps(value)}"
        for name, value in (defaults | settings).items()
    ]


def config(output: Path, **settings: Any) -> Config:
    """The configuration of `arguments`."""
    return load_config(arguments(output, **settings))


def train(settings: Config) -> Trainer:
    """Train on this rank; joins the process group if nobody has."""
    trainer = build_trainer(settings, init_distributed())
    trainer.run()
    return trainer


def lines(output: Path, event: str) -> list[dict[str, Any]]:
    """The log's lines of one kind."""
    return [line for line in read_log(output) if line["event"] == event]


def losses(output: Path) -> list[float]:
    """The loss of each step."""
    return [line["loss"] for line in lines(output, "step")]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of this rank's dense weights and of its parts of the sharded tables."""
    found = {}
    for name, value in trainer.model.state_dict().items():
        shards = value.local_shards() if hasattr(value, "local_shards") else None
        parts = [shard.tensor for shard in shards] if shards is not None else [value]
        for number, part in enumerate(parts):
            local = part.to_local() if hasattr(part, "to_local") else part
            found[f"{name}.{number}"] = local.detach().clone()
    return found


def on_rank(settings: Config) -> dict[str, Any]:
    """Train on one of several ranks; what it ended with."""
    trainer = train(settings)
    return {"metrics": trainer.metrics, "weights": weights(trainer), "step": trainer.step}


def each_on_rank(settings: dict[str, Config]) -> dict[str, dict[str, Any]]:
    """Train one configuration after the other on one of several ranks; `on_rank` of each.

    One group of ranks for many runs: each process that is new spends more than a tiny run on what it does first.
    """
    return {name: on_rank(of_one) for name, of_one in settings.items()}


def assert_equal_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not different, different[:5]


def interrupted(source: Path, target: Path, step: int) -> Path:
    """A copy of a finished run as it stood at a step's checkpoint."""
    shutil.copytree(source, target)
    for path in checkpoints_by_step(target / "checkpoints"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return target
