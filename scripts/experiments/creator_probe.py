"""Upper bounds for E1: how well a linear layer chooses the genre that is the text, by what is known about the user.

    python scripts/experiments/creator_probe.py --work runs/creator_e1 --steps 600

A linear layer scores the genres of the film; unlike a Creative LLM it does not have to learn a language. The table, the
base run and the tokenizer are those of `creator_e1.py --writer words`. The layer's input is one of: nothing; the shares
of genres among the user's latest 20 likes (which determine the text), latest 64 likes, or latest 128 events; the user
vector of the base run; the user vector while its encoder is trained with the layer. Prints nats and accuracy on the
validation users after training. In the configuration the user vector includes the weighted mean of the text embeddings
of the user's events; with `-- --creative.soft.text_decay=0` it is only the output of the user encoder.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import ROOT
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hllm_torchrec.config.loading import load_config
from hllm_torchrec.data.creative_table import CreativeTable
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.visibility import visible_before
from hllm_torchrec.distributed.process_group import distributed_device
from hllm_torchrec.evaluation.creative_scores import creative_vectors, measure_user_vectors
from hllm_torchrec.training.trainer import Trainer
from hllm_torchrec.training.trainer_setup import build_trainer

SPLITS = ("train", "valid")
MASKED = -1e9


class Texts:
    """Texts of a part as choices among G genres.

    may: [N, G] bool genres of the film; right: [N] genre that is the text; counts: window of the history -> [N, G]
    shares of the genres.
    """

    def __init__(self, dataset: Dataset, split: str) -> None:
        part = CreativeTable.open(dataset, "genres").part(split)
        values, offsets = dataset.feature_ids("item", "genres")
        names = ["", *dataset.feature_values("genres").to_pylist()]
        has = np.zeros((offsets.size - 1, len(names)), np.float32)
        has[np.repeat(np.arange(offsets.size - 1), np.diff(offsets)), values] = 1
        self.may = torch.from_numpy(has[part.item_ids] > 0)
        self.right = torch.tensor([names.index(text) for text in part.rows["response"].to_pylist()])
        windows: dict[str, list[np.ndarray]] = {"20 likes": [], "64 likes": [], "128 events": []}
        for user, second in zip(part.user_ids.tolist(), part.timestamps.tolist(), strict=True):
            events = dataset.user_events(user)
            seen = visible_before(events.timestamps, second)
            items, liked = events.item_ids[:seen], events.labels[:seen] == 1
            for name, chosen in zip(windows, (items[liked][-20:], items[liked][-64:], items[-128:]), strict=True):
                windows[name].append(has[chosen].mean(0))
        self.counts = {name: torch.from_numpy(np.stack(rows)) for name, rows in windows.items()}

    def scores(self, logits: Tensor) -> list[float]:
        """Return [nats, accuracy] of logits [N, G]."""
        masked = logits.masked_fill(~self.may, MASKED)
        return [float(cross_entropy(masked, self.right)), float((masked.argmax(1) == self.right).float().mean())]


def linear_choice(given: Tensor, texts: Texts) -> Callable[[Tensor], Tensor]:
    """Fit a linear layer to fixed vectors [N, F]; returns a function of vectors [n, F] that computes logits [n, G]."""
    torch.manual_seed(0)
    mean, deviation = given.mean(0), given.std(0) + 1e-6
    layer = nn.Linear(mean.numel(), texts.may.shape[1])
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05, weight_decay=1e-4)
    for _ in range(600):
        logits = layer((given - mean) / deviation).masked_fill(~texts.may, MASKED)
        cross_entropy(logits, texts.right).backward()
        optimizer.step()
        optimizer.zero_grad()
    layer.requires_grad_(False)
    return lambda vectors: layer((vectors - mean) / deviation)


def fit(given: dict[str, Tensor], texts: dict[str, Texts]) -> list[float]:
    """Fit a linear layer to fixed vectors {split: [N, F]}; returns [nats, accuracy] of the validation texts."""
    return texts["valid"].scores(linear_choice(given["train"], texts["train"])(given["valid"]))


def train_on(trainer: Trainer, texts: dict[str, Texts], steps: int) -> list[float]:
    """Train a linear layer and the user encoder together; returns [nats, accuracy] of the validation texts."""
    experiment, hllm = trainer.experiment, trainer.hllm
    layer = nn.Linear(hllm.user_vector_width, texts["train"].may.shape[1])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=trainer.config.optim.lr, weight_decay=0.0)
    loader, step = experiment.creative_loader("train", trainer.config.creative.per_batch, training=True), 0
    hllm.train()
    while step < steps:
        for batch in loader.batches(step):
            ratio = trainer.schedule.learning_rate_ratio(step)
            trainer._set_learning_rates(ratio)
            optimizer.param_groups[0]["lr"] = trainer.config.optim.lr * ratio
            assert batch.creative is not None and batch.request_query is not None
            logits = layer(hllm.embed_users(batch)[batch.request_query])
            rows = batch.creative.rows
            loss = cross_entropy(logits.masked_fill(~texts["train"].may[rows], MASKED), texts["train"].right[rows])
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in hllm.parameters() if p.grad is not None], 1.0)
            trainer.dense_optim.step()
            optimizer.step()
            trainer.dense_optim.zero_grad(set_to_none=True)
            optimizer.zero_grad()
            step += 1
            if step >= steps:
                break
    with torch.no_grad():
        return texts["valid"].scores(layer(creative_vectors(experiment, "valid").vectors))


def main(argv: Sequence[str] | None = None) -> None:
    """Print [nats, accuracy] for each input as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "creator_e1", help="folder of creator_e1.py")
    parser.add_argument("--dataset", type=Path, default=ROOT / "data" / "ml-100k", help="prepared MovieLens-100k")
    parser.add_argument("--models", type=Path, default=ROOT / ".cache" / "models" / "smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=600, help="steps of 32 texts with the user encoder; 0: none")
    parser.add_argument("options", nargs="*", help="options of `hllm train`, such as --optim.user_lr, after --")
    arguments = parser.parse_args(argv)
    dataset = Dataset.open(arguments.dataset)
    texts = {split: Texts(dataset, split) for split in SPLITS}
    found: dict[str, Any] = {"nothing": fit({s: torch.zeros(len(t.right), 1) for s, t in texts.items()}, texts)}
    found |= {name: fit({s: t.counts[name] for s, t in texts.items()}, texts) for name in texts["train"].counts}
    work: Path = arguments.work.resolve()
    words = work / "words"
    tiny = "{model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 1, "
    own = [f"--data.dataset={arguments.dataset.resolve()}", f"--item_llm.pretrained={arguments.models.resolve()}"]
    own += [f"--start_from={work / 'base'}", f"--output={work / 'probe'}", f"--creative.tokenizer={words}"]
    own += [f"--creative.shape={tiny}vocab_size: 4096}}", "--creative.pretrained=null", "--creative.layers=null"]
    own += [f"--max_steps={max(1, arguments.steps)}", "--stages=[{name: all, epochs: 99, item_embeddings: cached}]"]
    config = load_config(["--config", str(ROOT / "configs" / "creator" / "ml100k.yaml"), *own, *arguments.options])
    with distributed_device() as device:
        trainer = build_trainer(config, device)
        trainer.experiment.use_live_items()
        trainer.experiment.use_cached_items()
        if trainer.hllm.needs_user_statistics:
            measure_user_vectors(trainer.experiment)
        frozen = {split: creative_vectors(trainer.experiment, split).vectors for split in SPLITS}
        found["user vector"] = fit(frozen, texts)
        if arguments.steps:
            found["user vector, trained on"] = train_on(trainer, texts, arguments.steps)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
