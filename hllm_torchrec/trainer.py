"""The training loop: stages of epochs of steps, evaluated and saved on a schedule, resumable exactly."""

import math
from collections.abc import Generator
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from hllm_torchrec.bases import check_bases
from hllm_torchrec.checkpoint import load_checkpoint, load_rank_extra, set_rng_state
from hllm_torchrec.config import Config, StageConfig, save_config
from hllm_torchrec.config_files import to_dict
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.loader import Loader
from hllm_torchrec.errors import Preempted
from hllm_torchrec.evaluate import quick_metrics, score_split
from hllm_torchrec.exchange import global_sum
from hllm_torchrec.experiment import Experiment, build_experiment
from hllm_torchrec.frozen import use_store
from hllm_torchrec.keeper import CheckpointKeeper
from hllm_torchrec.logs import machine_info, peak_memory_bytes, progress
from hllm_torchrec.meter import StepMeter, global_matmul_peak, weights_of
from hllm_torchrec.modules.losses import MAX_SCALE
from hllm_torchrec.optim import (
    EmaWeights,
    TableOptimizer,
    clip_grad_norm,
    dense_optimizer,
    materialise_state,
    named_state,
    warmup_cosine,
)
from hllm_torchrec.parallelize import autocast, compute_dtype, user_attention, whole
from hllm_torchrec.preemption import LeaveRequest
from hllm_torchrec.remote.runs import place_to_write
from hllm_torchrec.resume import check_schedule, checkpoint_to_resume
from hllm_torchrec.retrieval import measures_retrieval, retrieve
from hllm_torchrec.schedule import Leg, evaluation_steps, plan_legs
from hllm_torchrec.start import start_from
from hllm_torchrec.step_guard import StepGuard
from hllm_torchrec.step_loss import LossWeights, describe_step, micro_batch_loss, step_counts
from hllm_torchrec.tables_ahead import TablesAhead, with_next
from hllm_torchrec.wandb_log import run_log


class Trainer:
    """Trains one configuration on this rank; `run` does it all.

    Raises:
        ConfigError: the configuration does not fit the dataset, the device, or what `output` holds already.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.place = place_to_write(config.output)
        self.output = self.place.folder
        self.checkpoint = checkpoint_to_resume(config, self.output)
        self.peak = global_matmul_peak(device, compute_dtype(config))  # draws numbers: before anything is seeded
        self.experiment: Experiment = build_experiment(config, device)
        self.model, self.hllm = self.experiment.model, self.experiment.hllm
        if config.start_from is not None:
            start_from(self.experiment, Path(config.start_from))
        self.dense = dense_optimizer(
            self.hllm.named_parameters(),
            learning_rate=config.optim.lr,
            part_learning_rates=self._part_rates(),
            weight_decay=config.optim.weight_decay,
            betas=config.optim.betas,
        )
        self.full_rates = [group["lr"] for group in self.dense.param_groups]
        self.tables = TableOptimizer(self.model.fused_optimizer)
        sharded = self.hllm.features.tables if config.parallel.overlap_tables else None
        self.ahead = TablesAhead(sharded) if sharded is not None else None
        averaged = self.experiment.averaged_parameters()
        self.ema = EmaWeights(averaged, config.optim.ema) if config.optim.ema else None
        self.loss_weights = LossWeights.of(config)
        self.validation = self.experiment.loader("valid", config.evaluation.batch_users)
        self.loaders: dict[StageConfig, Loader] = {}
        self.legs = plan_legs(config.stages, self._epoch_steps)
        self.total_steps = self.legs[-1].first + self.legs[-1].steps
        if config.max_steps:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.warmup_steps = max(1, round(config.optim.warmup * self.total_steps))
        self.evaluate_after = evaluation_steps(self.legs, config.evaluation.every, self.total_steps)
        self.step, self.best, self.stale = 0, -math.inf, 0
        self.keeper = CheckpointKeeper(config, self.place)
        self.guard = StepGuard(config, self.rank, self.output)
        self.owed = False  # whether the present step's evaluation is still to come
        self.leave, self.leaving = LeaveRequest(), False
        self.unsaved = False  # whether a checkpoint in flight has failed
        self.metrics: dict[str, Any] = {}

    # ------------------------------------------------------------------ the loop

    def run(self) -> dict[str, Any]:
        """Train to the end (or until it stops getting better) and return the last evaluation.

        Raises:
            Preempted: a rank was sent SIGTERM; the state after the last step is saved.
            FloatingPointError: the loss is not finite, or the item embeddings have collapsed.
        """
        started = weights_of(self.hllm, self.experiment.encoder)
        self._resume()
        if self.hllm.takes_stored_items:
            use_store(self.experiment)
        with (
            self.place.published(),
            run_log(self.config, self.output, self.rank, self.step) as self.log,
            progress(self.total_steps, "train", self.rank == 0, unit="step", initial=self.step) as self.bar,
            self.leave,
            self.keeper.in_a_run(),
        ):
            self._log_start()
            try:
                self._train_legs()
            except Preempted:
                self._save_and_leave()
            except RuntimeError as error:
                error.add_note(f"after step {self.step}")
                raise
            self.keeper.close(self.log)
            moved = weights_of(self.hllm, self.experiment.encoder).moved_since(started)
            self.log.write("end", self.step, **peak_memory_bytes(), weights_moved=moved, live_steps=self._live_steps())
        if self.rank == 0:
            print(self._closing_line(moved), flush=True)
        return self.metrics | {"weights_moved": moved}

    def _train_legs(self) -> None:
        if self.owed:
            self._evaluate_and_save()
        for leg in self.legs:
            if leg.first + leg.steps <= self.step or leg.first >= self.total_steps or self._is_stale():
                continue
            self._enter(leg)
            self._train_leg(leg)

    def _save_and_leave(self) -> NoReturn:
        if self.keeper.saved != self.step:
            self._save(None)
        self.keeper.close(self.log)
        self.log.write("preempted", self.step)
        raise Preempted(f"asked to leave (SIGTERM) after step {self.step}, which is saved: continue with resume: true")

    def _live_steps(self) -> int:
        """Steps so far through which gradients reached the Item LLM."""
        legs = [leg for leg in self.legs if leg.stage.item_embeddings == "trained"]
        steps = sum(max(0, min(self.step, leg.first + leg.steps) - leg.first) for leg in legs)
        return steps if self.config.item_llm.enabled and self.config.item_llm.trainable else 0

    def _closing_line(self, moved: dict[str, float]) -> str:
        """What was trained, for the reader of the log: relative changes of weights and of item embeddings."""
        live = self._live_steps()
        shown = ", ".join(f"{part} {change:.2%}" for part, change in moved.items())
        return (
            f"trained {self.step} steps, {live} of them ({live / max(self.step, 1):.0%}) end to end through the "
            f"Item LLM; moved: {shown}"
        )

    def _train_leg(self, leg: Leg) -> None:
        meter = StepMeter(self.hllm, self.experiment.encoder, self.peak)
        with closing(self._micro_batches(leg)) as steps:
            for batches, following in with_next(steps, self.ahead is not None):
                numbers, rates = self.train_step(batches, following), meter.tick(batches)
                if numbers:
                    self.log.write("step", self.step, stage=leg.stage.name, epoch=leg.epoch, **numbers, **rates)
                    self.bar.set_postfix(loss=f"{numbers['loss']:.4f}", refresh=False)
                else:
                    self.log.write("skipped", self.step, reason=self.guard.reason)
                self.bar.update(1)
                self._after_step()
                if self._is_stale():
                    break
                meter.restart()
        if self.ahead is not None:
            self.ahead.finish()

    def train_step(self, batches: list[HybridBatch], following: list[HybridBatch] | None = None) -> dict[str, float]:
        """Forward and backward of every micro-batch, then the dense optimizer's step; what the log shows.

        Nothing where the step is skipped: see `StepGuard`.
        following: micro-batches of the next step, on the device: their table ids may be exchanged ahead.
        """
        self._set_learning_rates(self._rate_ratio())
        batches = [batch.to(self.device, non_blocking=True) for batch in batches]
        counts = step_counts(batches)
        numbers = torch.zeros(7, dtype=torch.float64)
        for batch, coming in pairwise([*batches, following[0] if following else None]):
            assert batch is not None
            with self._no_sync() if batch is not batches[-1] else nullcontext():
                if self.ahead is not None and coming is not None:
                    self.ahead.begin(coming.features)
                with autocast(self.config, self.device):
                    output = self.model(batch)
                loss, of_batch = micro_batch_loss(output, counts, self.loss_weights, self.hllm.live_items)
                if self.ahead is not None:
                    self.ahead.send()
                numbers += of_batch
                if refused := self.guard.refuses(loss):
                    break
                (loss * self.world).backward()
        norm = math.nan if refused else self._dense_step()
        self.step += 1
        if self.ema is not None and math.isfinite(norm):
            self.ema.update(self.step)
        found = self._describe(numbers, norm, batches)
        return found and found | {"grad_norm": norm, "lr": self.dense.param_groups[0]["lr"]}

    def _describe(self, numbers: Tensor, norm: float, batches: list[HybridBatch]) -> dict[str, float]:
        totals = global_sum(torch.cat([numbers, numbers.new_tensor([self.leave.asked, self.keeper.failed])]))
        self.leaving, self.unsaved = totals[-2:].bool().tolist()
        try:
            found = describe_step(totals[:-2], norm, self.config, alarm=self.step > self.warmup_steps)
        except FloatingPointError as error:
            self.dense.zero_grad(set_to_none=True)  # a step that was refused has its earlier micro-batches' gradients
            self.guard.failed(self.step, batches, str(error), may_skip=not math.isfinite(norm))
            return {}
        self.guard.passed()
        if self.hllm.generates:
            log_scale = whole(self.hllm.logit_scale.log_scale.detach())
            found["temperature"] = max(1 / MAX_SCALE, float((-log_scale).exp()))
        return found

    def _dense_step(self) -> float:
        """Step by the gradients, if they are finite; their norm before clipping, the same on every rank."""
        trained = [p for group in self.dense.param_groups for p in group["params"]]
        norm = float(clip_grad_norm(trained, self.config.optim.clip_norm))
        if math.isfinite(norm):
            self.dense.step()
        self.dense.zero_grad(set_to_none=True)
        return norm

    def _no_sync(self) -> AbstractContextManager[None]:
        """DDP sums micro-batches before it communicates; FSDP2 communicates each, which costs only time."""
        inner = self.model._dmp_wrapped_module
        context: AbstractContextManager[None] = inner.no_sync() if hasattr(inner, "no_sync") else nullcontext()
        return context

    # ------------------------------------------------------------------ schedule

    def _epoch_steps(self, stage: StageConfig, epoch: int) -> int:
        return -(-self._loader(stage).steps(epoch) // self.config.optim.accumulate)

    def _loader(self, stage: StageConfig) -> Loader:
        if stage not in self.loaders:
            self.loaders[stage] = self.experiment.loader(
                "train",
                stage.batch_users or self.config.data.batch_users,
                training=True,
                max_history=stage.max_history,
                batch_item_tokens=0 if stage.batch_users else self.config.data.batch_item_tokens,
            )
        return self.loaders[stage]

    def _micro_batches(self, leg: Leg) -> Generator[list[HybridBatch], None, None]:
        """The micro-batches of each step of the leg that is still to be done."""
        accumulate = self.config.optim.accumulate
        done = max(0, self.step - leg.first)
        with closing(self._loader(leg.stage).batches(leg.epoch, done * accumulate)) as batches:
            for _ in range(done, min(leg.steps, self.total_steps - leg.first)):
                yield [batch.to(self.device, non_blocking=True) for batch in islice(batches, accumulate)]

    def _enter(self, leg: Leg) -> None:
        """Item embeddings as the stage wants them: live, or from a cache filled by the present weights.

        A run resumed within a cached stage fills it anew: the Item LLM is as it was when the stage began,
        since nothing trains it in such a stage.
        """
        cached = leg.stage.item_embeddings == "cached" and self.hllm.item_llm is not None
        if leg.opens_stage or (cached and self.hllm.item_cache is None):
            self.hllm.item_cache = None
            if cached:
                self.hllm.item_cache = self.experiment.encode_catalogue()
            if self.hllm.wants_measuring:
                self.log.write("measured", self.step, **self.experiment.measure_items())
            self.log.write("stage", self.step, name=leg.stage.name, item_embeddings=leg.stage.item_embeddings)

    def _rate_ratio(self) -> float:
        return warmup_cosine(self.step, self.warmup_steps, self.total_steps, self.config.optim.min_lr_ratio)

    def _set_learning_rates(self, ratio: float) -> None:
        for group, rate in zip(self.dense.param_groups, self.full_rates, strict=True):
            group["lr"] = rate * ratio
        self.tables.set_ratio(ratio)

    def _part_rates(self) -> dict[str, float]:
        item_llm, optim = self.hllm.item_llm, self.config.optim
        trains_items = item_llm is not None and any(p.requires_grad for p in item_llm.parameters())
        rates = {"item_llm": optim.item_llm_lr if trains_items else None, "user": optim.user_lr}
        return {part: rate for part, rate in rates.items() if rate is not None}

    def _log_start(self) -> None:
        if self.rank == 0:
            save_config(self.config, self.output / "config.yaml")
        self.log.write(
            "start",
            self.step,
            world=self.world,
            total_steps=self.total_steps,
            parameters=sum(p.numel() for p in self.hllm.parameters()),
            matmul_peak=self.peak,
            item_attention=None if self.hllm.item_llm is None else str(self.hllm.item_llm.attention),
            user_attention=user_attention(self.hllm.user, self.device),
            machine=machine_info(),
        )

    # ------------------------------------------------------------------ evaluation and checkpoints

    def _after_step(self) -> None:
        """What is due after the present step."""
        every = self.config.evaluation.checkpoint_every
        self.owed = self.step in self.evaluate_after
        if self.unsaved:
            self.keeper.settle(self.log)
        if self.leaving:
            raise Preempted
        if self.owed:
            self._evaluate_and_save()
        elif every and self.step % every == 0:
            self._save(None)

    def _evaluate_and_save(self) -> None:
        self.metrics = self.evaluate()
        own = "auc" if "auc" in self.metrics else f"ndcg@{self.config.evaluation.ks[0]}"
        score = float(self.metrics[own])
        self.stale = 0 if score > self.best else self.stale + 1
        self.best = max(self.best, score)
        self.owed = False
        self.log.write("eval", self.step, split="valid", **self.metrics)
        self._save(score)
        self.guard.look_for_leakage(self.step, self.metrics.get("auc"))

    def save_untrained(self) -> dict[str, Any]:
        """Evaluate and save the model as it stands: a run of no steps, of weights that were trained elsewhere.

        Returns the evaluation. Collective.
        """
        with self.place.published(), run_log(self.config, self.output, self.rank, 0) as self.log:
            self._log_start()
            self._evaluate_and_save()
            self.keeper.close(self.log)
        return self.metrics

    def evaluate(self) -> dict[str, Any]:
        """Validation metrics with the averaged weights, if there are any. Collective."""
        with self.ema.swapped() if self.ema is not None else nullcontext():
            kept = self.hllm.item_cache
            if kept is None:
                self.hllm.item_cache = self.experiment.items_to_evaluate_with()
            metrics: dict[str, Any] = {}
            if self.hllm.fusion != "none":
                cold = self.experiment.cold_items()
                scored = score_split(self.model, self.validation, self.device, cold=cold)
                metrics |= quick_metrics(scored, self.config.evaluation.auc)
            if measures_retrieval(self.experiment):
                found = retrieve(self.experiment, self.validation)
                metrics |= {"retrieval_rows" if name == "rows" else name: n for name, n in found.items()}
            self.hllm.item_cache = kept
        return metrics

    def _is_stale(self) -> bool:
        return 0 < self.config.evaluation.patience <= self.stale

    def _state(self) -> dict[str, Any]:
        materialise_state(self.dense)
        state: dict[str, Any] = {
            "model": self.experiment.model_state(),
            "dense": named_state(self.dense, self.hllm.named_parameters()),
            "tables": self.tables.state(),
        }
        return state | ({"ema": self.ema.state_dict()} if self.ema is not None else {})

    def _save(self, score: float | None) -> None:
        extra = {
            "best": self.best if math.isfinite(self.best) else None,
            "stale": self.stale,
            "owed": self.owed,
            "leg_steps": [leg.steps for leg in self.legs],
            "config": to_dict(self.config),
            "bases": self.experiment.bases,
        }
        self.keeper.save(self.step, self._state(), extra, score, self.log)

    def _resume(self) -> None:
        """Continue from the last complete checkpoint, if asked to and there is one."""
        if self.checkpoint is None:
            return
        extra = load_checkpoint(self.checkpoint, self._state())
        check_bases(extra, self.experiment.bases, self.config, self.checkpoint)
        check_schedule(self.checkpoint, extra, self.legs)
        self.step = self.keeper.saved = extra["step"]
        self.stale, self.owed = extra["stale"], extra.get("owed", False)
        self.best = -math.inf if extra["best"] is None else extra["best"]
        self.tables.set_step(self.step * self.config.optim.accumulate)
        if (own := load_rank_extra(self.checkpoint)) is not None:
            set_rng_state(own["rng"])
