"""The training loop: stages of epochs of steps, evaluated and saved on a schedule, resumable exactly."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hllm_torchrec.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_rank_extra,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from hllm_torchrec.config import Config, StageConfig, save_config, to_dict
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.loader import Loader
from hllm_torchrec.evaluate import quick_metrics, score_retrieval, score_split
from hllm_torchrec.exchange import global_sum
from hllm_torchrec.experiment import Experiment, build_experiment
from hllm_torchrec.logs import RunLog, machine_info, peak_memory_bytes, progress
from hllm_torchrec.model import HLLMOutput
from hllm_torchrec.modules.losses import embedding_spread
from hllm_torchrec.optim import (
    EmaWeights,
    TableOptimizer,
    clip_grad_norm,
    dense_optimizer,
    materialise_state,
    named_state,
    warmup_cosine,
)
from hllm_torchrec.parallelize import autocast
from hllm_torchrec.meter import StepMeter, weights_of


@dataclass(frozen=True)
class Leg:
    """Consecutive steps of one epoch in one stage. `first` is the global number of its first step."""

    stage: StageConfig
    epoch: int
    first: int
    steps: int
    opens_stage: bool


class Trainer:
    """Trains one configuration on this rank; `run` does it all."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.output = Path(config.output)
        self.experiment: Experiment = build_experiment(config, device)
        self.model, self.hllm = self.experiment.model, self.experiment.hllm
        self.dense = dense_optimizer(
            self.hllm.named_parameters(),
            learning_rate=config.optim.lr,
            part_learning_rates=self._part_rates(),
            weight_decay=config.optim.weight_decay,
        )
        self.full_rates = [group["lr"] for group in self.dense.param_groups]
        self.tables = TableOptimizer(self.model.fused_optimizer)
        self.ema = EmaWeights(self.hllm.named_parameters(), config.optim.ema) if config.optim.ema else None
        self.validation = self.experiment.loader("valid", config.evaluation.batch_users)
        self.loaders: dict[str, Loader] = {}
        self.legs = self._legs()
        self.total_steps = self.legs[-1].first + self.legs[-1].steps
        if config.max_steps:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.step, self.best, self.stale = 0, -math.inf, 0

    # ------------------------------------------------------------------ the loop

    def run(self) -> dict[str, Any]:
        """Train to the end (or until it stops getting better) and return the last evaluation."""
        resumed = self._resume()
        if self.rank == 0:
            save_config(self.config, self.output / "config.yaml")
        evaluation: dict[str, Any] = {}
        started = weights_of(self.hllm)
        with (
            RunLog(self.output, self.rank, resumed_step=resumed) as self.log,
            progress(self.total_steps, "train", self.rank == 0, unit="step", initial=self.step) as self.bar,
        ):
            self.log.write("start", self.step, world=self.world, total_steps=self.total_steps, machine=machine_info())
            for leg in self.legs:
                if leg.first + leg.steps <= self.step or leg.first >= self.total_steps:
                    continue
                self._enter(leg)
                self._train_leg(leg)
                evaluation = self._maybe_evaluate(leg) or evaluation
                if self._is_stale():
                    break
            moved = weights_of(self.hllm).moved_since(started)
            self.log.write("end", self.step, **peak_memory_bytes(), weights_moved=moved)
        return evaluation | {"weights_moved": moved}

    def _train_leg(self, leg: Leg) -> None:
        done = max(0, self.step - leg.first)
        meter = StepMeter(self.experiment.encoder)
        for batch in self._batches(leg, done):
            numbers = self.train_step(batch)
            self.log.write("step", self.step, stage=leg.stage.name, epoch=leg.epoch, **numbers, **meter.tick(batch, self.world))
            self.bar.set_postfix(loss=f"{numbers['loss']:.4f}", refresh=False)
            self.bar.update(1)

    def train_step(self, batch: HybridBatch) -> dict[str, float]:
        """Forward, backward and, when enough micro-batches have come together, the optimizer's step."""
        optim = self.config.optim
        self._set_learning_rates(warmup_cosine(self.step, self._warmup_steps(), self.total_steps, optim.min_lr_ratio))
        batch = batch.to(self.device, non_blocking=True)
        counts = global_sum(torch.tensor([batch.weights.sum().item(), float(batch.next_rows.numel())], dtype=torch.float64))
        steps_now = (self.step + 1) % optim.accumulate == 0 or self.step + 1 == self.total_steps
        with nullcontext() if steps_now else self._no_sync():
            with autocast(self.config, self.device):
                output = self.model(batch)
            loss, parts = self._loss(output, counts.tolist())
            (loss * self.world / optim.accumulate).backward()
        norm = float(self._dense_step()) if steps_now else float("nan")
        self.step += 1
        if self.ema is not None and steps_now:
            self.ema.update(self.step)
        numbers = self._report(parts, output)
        return numbers | {"grad_norm": norm, "lr": self.dense.param_groups[0]["lr"]}

    def _loss(self, output: HLLMOutput, counts: list[float]) -> tuple[Tensor, list[Tensor]]:
        """This rank's share of Eq. (3): local sums over global counts, so that ranks' losses add up."""
        classification = output.classification / max(counts[0], 1.0)
        weight = 1.0 if self.hllm.fusion == "none" else self.config.objective.generative_weight
        generative = classification.new_zeros(())
        if output.generative is not None:
            generative = output.generative.loss_sum / max(counts[1], 1.0)
        return weight * generative + classification, [classification.detach(), generative.detach()]

    def _report(self, parts: list[Tensor], output: HLLMOutput) -> dict[str, float]:
        """Losses summed over ranks; stops the run on a loss that is not finite or on collapsed items."""
        cls, gen = global_sum(torch.stack(parts).double().cpu()).tolist()
        weight = 1.0 if self.hllm.fusion == "none" else self.config.objective.generative_weight
        numbers = {"loss": cls + weight * gen, "loss_cls": cls, "loss_gen": gen}
        if not math.isfinite(numbers["loss"]):
            raise FloatingPointError(f"step {self.step}: the loss is {numbers['loss']}: lower optim.lr or optim.table_lr, or set optim.clip_norm")
        if output.generative is not None:
            numbers |= {
                "effective_negatives": float(output.generative.effective_negatives),
                "gen_accuracy": float(output.generative.accuracy),
                "temperature": float(1 / self.hllm.logit_scale()),
            }
        if output.items is not None and output.items.shape[0] > 1 and self.hllm.item_cache is None:
            numbers["item_similarity"] = float(embedding_spread(output.items.float()))
            self._check_collapse(numbers["item_similarity"])
        return numbers

    def _check_collapse(self, similarity: float) -> None:
        limit = self.config.objective.collapse_above
        if self.hllm.generates and similarity > limit:
            raise FloatingPointError(
                f"step {self.step}: item embeddings have collapsed: their mean cosine similarity is {similarity:.4f} > "
                f"objective.collapse_above {limit}; lower optim.item_llm_lr or raise objective.generative_weight"
            )

    def _dense_step(self) -> Tensor:
        trained = [p for group in self.dense.param_groups for p in group["params"]]
        norm = clip_grad_norm(trained, self.config.optim.clip_norm)
        self.dense.step()
        self.dense.zero_grad(set_to_none=True)
        return norm

    def _no_sync(self) -> Any:
        inner = self.model._dmp_wrapped_module
        return inner.no_sync() if hasattr(inner, "no_sync") else nullcontext()

    # ------------------------------------------------------------------ schedule

    def _legs(self) -> list[Leg]:
        legs: list[Leg] = []
        first = epoch = 0
        for stage in self.config.stages:
            loader, left = self._loader(stage), stage.epochs
            opens = True
            while left > 1e-9:
                steps = max(1, round(min(left, 1.0) * loader.steps(epoch)))
                legs.append(Leg(stage, epoch, first, steps, opens))
                first, epoch, left, opens = first + steps, epoch + 1, left - 1.0, False
        return legs

    def _loader(self, stage: StageConfig) -> Loader:
        if stage.name not in self.loaders:
            self.loaders[stage.name] = self.experiment.loader(
                "train", stage.batch_users or self.config.data.batch_users, training=True, max_history=stage.max_history
            )
        return self.loaders[stage.name]

    def _batches(self, leg: Leg, done: int) -> Iterator[HybridBatch]:
        last = min(leg.steps, self.total_steps - leg.first)
        for number, batch in enumerate(self._loader(leg.stage).batches(leg.epoch, done), start=done):
            if number >= last:
                return
            yield batch

    def _enter(self, leg: Leg) -> None:
        """Item embeddings as the stage wants them: live, or from a cache filled by the present weights."""
        cached = leg.stage.item_embeddings == "cached"
        if leg.opens_stage or (cached and self.hllm.item_cache is None):
            self.hllm.item_cache = None
            if cached:
                self.hllm.item_cache = self.experiment.encode_catalogue()
            self.log.write("stage", self.step, name=leg.stage.name, item_embeddings=leg.stage.item_embeddings)

    def _warmup_steps(self) -> int:
        return max(1, round(self.config.optim.warmup * self.total_steps))

    def _set_learning_rates(self, ratio: float) -> None:
        for group, rate in zip(self.dense.param_groups, self.full_rates, strict=True):
            group["lr"] = rate * ratio
        self.tables.set_ratio(ratio)

    def _part_rates(self) -> dict[str, float]:
        rates = {}
        if self.hllm.item_llm is not None and any(p.requires_grad for p in self.hllm.item_llm.parameters()):
            rates["item_llm"] = self.config.optim.item_llm_lr
        if self.config.optim.user_lr is not None:
            rates["user"] = self.config.optim.user_lr
        return rates

    # ------------------------------------------------------------------ evaluation and checkpoints

    def _maybe_evaluate(self, leg: Leg) -> dict[str, Any]:
        every = self.config.evaluation.every
        last = self.step >= self.total_steps
        if not last and int((leg.epoch + 1) / every) == int(leg.epoch / every):
            return {}
        metrics = self.evaluate()
        score = metrics.get("auc", metrics.get("ndcg@10", float("nan")))
        self.stale = 0 if score > self.best else self.stale + 1
        self.best = max(self.best, score)
        self.log.write("eval", self.step, split="valid", **metrics)
        self._save(score)
        return metrics

    def evaluate(self) -> dict[str, Any]:
        """Validation metrics with the averaged weights, if there are any. Collective."""
        with self.ema.swapped() if self.ema is not None else nullcontext():
            kept, self.hllm.item_cache = self.hllm.item_cache, None
            items = self.experiment.encode_catalogue() if kept is None or self.ema is not None else kept
            self.hllm.item_cache = items
            metrics: dict[str, Any] = {}
            if self.hllm.fusion != "none":
                metrics |= quick_metrics(score_split(self.model, self.validation, self.device, cold=self.experiment.cold_items()))
            if self.config.evaluation.retrieval or self.hllm.fusion == "none":
                assert items is not None
                metrics |= score_retrieval(self.model, self.validation, items, self.device, self.config.evaluation.ks)
            self.hllm.item_cache = kept
        return metrics

    def _is_stale(self) -> bool:
        return 0 < self.config.evaluation.patience <= self.stale

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "dense": named_state(self.dense, self.hllm.named_parameters()),
            "tables": self.tables.state(),
        }
        return state | ({"ema": self.ema.state_dict()} if self.ema is not None else {})

    def _save(self, score: float) -> None:
        materialise_state(self.dense)
        save_checkpoint(
            self.output / "checkpoints",
            self.step,
            self._state(),
            {"step": self.step, "best": self.best, "stale": self.stale, "config": to_dict(self.config)},
            rank_extra={"rng": rng_state()},
            keep_last=self.config.evaluation.keep_last,
            keep_best="max",
            metric=score,
        )

    def _resume(self) -> int | None:
        """Continue from the last complete checkpoint, if asked to and there is one."""
        path = latest_checkpoint(self.output / "checkpoints") if self.config.resume else None
        if path is None:
            return None
        materialise_state(self.dense)
        extra = load_checkpoint(path, self._state())
        self.step, self.best, self.stale = extra["step"], extra["best"], extra["stale"]
        self.tables.set_step(self.step)
        own = load_rank_extra(path)
        if own is not None:
            set_rng_state(own["rng"])
        return self.step
