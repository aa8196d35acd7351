"""How `saved/` was made. It is never made again to make a test pass.

What is saved stands for what users have on their disks: a later version must read it, evaluate it to the same numbers
and train on from it. So a failing test means that the library has changed, and the library is what is to be mended. A
new kind of run is added beside the old ones, made by the version that brings it.

    PYTHONPATH=. python tests/artifacts/make.py TARGET      # TARGET: a folder that is not there yet

`saved/recorded.json` says which version, commit, and packages made it. Each run was trained to its end; its losses were
recorded, and of its checkpoints only the first is kept, at which the tests evaluate it and go on. All paths in
the files are relative: every job runs in the folder. The log's facts about the machine are cut to the packages.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.artifacts.numerics import SETTINGS, probe, versions

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}
USER: dict[str, Any] = {**LLAMA, "num_key_value_heads": 2, "vocab_size": 3}
COMMON: dict[str, Any] = {
    "data.dataset": "dataset",
    "data.batch_users": 4,
    "data.max_history": 32,
    "data.item_features": ["genres"],
    "data.user_features": ["country"],
    "data.numeric_features": ["user_mean"],
    "features.time_width": 4,
    "features.shard_from_rows": 30,  # items are sharded, most of the others are replicated
    "objective.negatives": 8,
    "objective.head_hidden": 8,
    "objective.collapse_above": 1,
    "objective.generative_weight": 0.5,
    "stages": [{"name": "only", "epochs": 1}],
    "optim.lr": 0.01,
    "optim.item_llm_lr": 0.01,
    "evaluation.every": 0.5,
    "evaluation.batch_users": 8,
    "evaluation.keep_last": 100,
    "evaluation.ks": [3, 10],
}
ITEMS: dict[str, Any] = {
    "item_llm.shape": LLAMA,
    "item_llm.tokenizer": "tokenizer",
    "item_llm.text_keys": ["title", "brand"],
    "item_llm.max_text_length": 12,
}
TEXT = {**ITEMS, "user.shape": USER}
PRETRAINED = {"item_llm.shape": None, "item_llm.pretrained": "pretrained/item", "user.pretrained": "pretrained/user"}
RUNS: dict[str, dict[str, Any]] = {
    "ids": {"item_llm.enabled": False, "user.shape": USER, "optim.table_optimizer": "adagrad"},
    "early": {**TEXT, "objective.fusion": "early", "item_llm.pooling": "mean", "objective.value_weight": 0.1},
    "late": {**TEXT, "objective.fusion": "late", "evaluation.retrieval": True, "objective.head_dropout": 0.2},
    "hstu": {
        **ITEMS,
        "user.encoder": "hstu",
        "user.shape": {"width": 16, "layers": 2, "heads": 2, "max_positions": 64, "dropout": 0.1},
        "user.actions": "interleaved",
    },
    "sasrec": {
        "item_llm.enabled": False,
        "user.encoder": "sasrec",
        "user.shape": {"width": 16, "layers": 1, "heads": 2, "max_positions": 32, "dropout": 0.2},
        "objective.fusion": "none",
        "objective.generative_loss": "bce",
    },
    "lora": {
        **ITEMS,
        **PRETRAINED,
        "item_llm.lora": {"rank": 2, "alpha": 4.0, "dropout": 0.1, "targets": ["q_proj", "v_proj", "down_proj"]},
        "user.lora": {"rank": 2, "alpha": 8.0},
    },
    "ema": {
        **TEXT,
        "stages": [
            {"name": "live", "epochs": 0.3},
            {"name": "cached", "epochs": 1, "item_embeddings": "cached"},
            {"name": "live again", "epochs": 0.2},
        ],
        "optim.ema": 0.9,
        "optim.accumulate": 2,
        "item_llm.standardise": True,
        "data.stochastic_length": 1.3,
    },
    "stored": {
        **TEXT,
        "stages": [{"name": "stored", "epochs": 1, "item_embeddings": "stored"}],
        "item_llm.store": "stores/items",
        "item_llm.adapter": 2,
        "start_from": "trained/late",
    },
}
"""Run -> its options; in this order, since `stored` begins with what `late` has learned."""


def make() -> None:
    """Fill the present folder, which is empty."""
    from tests.artifacts import jobs

    write_sources()
    jobs.prepare(Path("dataset"))
    recorded: dict[str, Any] = {"runs": {}}
    for name, options in RUNS.items():
        run = Path("trained", name)
        settings = COMMON | options | {"output": str(run)}
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()}
        jobs.job("train", *(f"--{key}={text}" for key, text in texts.items()))
        recorded["runs"][name] = {**jobs.steps(run), "last_evaluation": jobs.last_evaluation(run)}
        recorded["runs"][name]["kept_step"] = keep_first_checkpoint(run)
        jobs.evaluate(run)
        tidy(run)
        if name == "late":
            jobs.embed(run, Path("stores"))
    stores = ("items", "users")
    recorded["stores"] = {name: jobs.vectors(Path("stores", name), Path("scratch", name)) for name in stores}
    shutil.rmtree("scratch")
    jobs.compare(Path("compared"), [name for name in RUNS if Path("trained", name, "predictions").is_dir()])
    forget_machine(Path("compared", "metrics-valid.json"))
    for name in RUNS:
        jobs.pack(Path("trained", name, "checkpoints"))
    recorded |= {"made_by": {"hllm_torchrec": version_and_commit(), "packages": versions()}, "probe": probe()}
    Path("recorded.json").write_text(json.dumps(recorded, indent=1) + "\n")


def write_sources() -> None:
    """The shop's CSV files, its tokeniser, and LLMs as if downloaded."""
    import torch

    from hllm_torchrec.models.backbones import build_backbone
    from tests.helpers import fixtures

    fixtures.write_shop(Path("source"))
    shutil.copytree(fixtures.tokenizer_dir(), "tokenizer")
    for name, shape in (("item", LLAMA), ("user", USER)):
        torch.manual_seed(3)
        build_backbone(None, shape).save_pretrained(Path("pretrained", name))


def keep_first_checkpoint(run: Path) -> int:
    """Make the run one that was interrupted after its first checkpoint; returns its step."""
    first, *later = sorted((run / "checkpoints").iterdir())
    for path in later:
        shutil.rmtree(path)
    step = int(first.name.removeprefix("step-"))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["step"] <= step]
    for line in kept:
        if "machine" in line:
            line["machine"] = {"packages": line["machine"]["packages"]}
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return step


def tidy(run: Path) -> None:
    """Drop what names the machine or is not read again."""
    shutil.rmtree(run / "tensorboard")
    forget_machine(run / "metrics-valid.json")


def forget_machine(path: Path) -> None:
    """Drop it from a file of metrics."""
    metrics = json.loads(path.read_text())
    metrics["provenance"].pop("machine")
    path.write_text(json.dumps(metrics, indent=1) + "\n")


def version_and_commit() -> dict[str, Any]:
    """The library's version and the commit of the checkout that was run."""
    import hllm_torchrec
    from hllm_torchrec.common.machine import machine_info

    return {"version": hllm_torchrec.__version__, "commit": machine_info()["commit"]}


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | SETTINGS)
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    os.chdir(target)
    make()
