"""Training loop: stages, epochs and steps, with scheduled evaluation and checkpoints; resumes exactly."""

import math
from collections.abc import Generator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from tqdm import tqdm

from hllm_torchrec.checkpoint.load import load_checkpoint, load_rank_extra, set_rng_state
from hllm_torchrec.checkpoint.manager import CheckpointManager
from hllm_torchrec.common.errors import Preempted
from hllm_torchrec.common.machine import machine_info, peak_memory_bytes
from hllm_torchrec.common.progress import progress
from hllm_torchrec.common.run_log import RunLog
from hllm_torchrec.common.terminal import say
from hllm_torchrec.config.loading import save_config
from hllm_torchrec.config.paths import with_absolute_paths
from hllm_torchrec.config.rules import takes_stored_items
from hllm_torchrec.config.schema import StageConfig
from hllm_torchrec.data.batch import HybridBatch
from hllm_torchrec.data.creative_loader import CreativeLoader
from hllm_torchrec.data.loader import Loader
from hllm_torchrec.distributed.collectives import global_sum
from hllm_torchrec.distributed.preemption import PreemptionHandler
from hllm_torchrec.distributed.wrappers import full_tensor
from hllm_torchrec.embedding.hash_tables import take_hash_counts
from hllm_torchrec.embedding.optimizers import TableOptimizer
from hllm_torchrec.embedding.prefetch import TablePrefetcher, with_lookahead
from hllm_torchrec.evaluation.catalogue_retrieval import evaluate_retrieval, measures_retrieval
from hllm_torchrec.evaluation.creative_scores import creative_metrics, measure_user_vectors, score_creatives
from hllm_torchrec.evaluation.scoring import quick_metrics, score_split
from hllm_torchrec.models.ema import EmaWeights
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.new_rows import fill_new_rows
from hllm_torchrec.models.parallelize import autocast, user_attention
from hllm_torchrec.models.stored_items import use_stored_items
from hllm_torchrec.models.text_format import check_saved_format
from hllm_torchrec.modules.losses.objectives import MAX_SCALE
from hllm_torchrec.training.early_stopping import EarlyStopping
from hllm_torchrec.training.loss import LossWeights, StepStats, describe_step, micro_batch_loss, step_counts
from hllm_torchrec.training.optim import (
    dense_optimizer,
    dense_step,
    materialize_state,
    named_optimizer_state,
)
from hllm_torchrec.training.resume import changed_settings, check_schedule
from hllm_torchrec.training.stage_schedule import EpochSegment, RunSchedule
from hllm_torchrec.training.step_guard import StepGuard
from hllm_torchrec.training.throughput import StepMeter, snapshot_weights, summary_line, untrained_tasks
from hllm_torchrec.training.wandb_sink import open_run_log


class Trainer:
    """Trains a model on this rank; the entry point is `run`. `build_trainer` builds one from a configuration.

    The constructor is not collective: it does not communicate or draw random numbers.

    Args:
        experiment: the model with its initial weights, and the dataset.
        checkpoints: checkpoint manager; its `output` is the run's folder.
        resume_from: the checkpoint from which `run` continues, or None.
        peak_flops: FLOP/s of all ranks together, for the log's utilization.
    """

    log: RunLog
    bar: tqdm

    def __init__(
        self,
        experiment: Experiment,
        checkpoints: CheckpointManager,
        resume_from: Path | None = None,
        peak_flops: float = math.nan,
    ) -> None:
        self.config, self.device = experiment.config, experiment.device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.checkpoints, self.output = checkpoints, checkpoints.output
        self.checkpoint, self.peak_flops = resume_from, peak_flops
        self.experiment, self.model, self.hllm = experiment, experiment.model, experiment.hllm
        optim = self.config.optim
        self.dense_optim = dense_optimizer(
            self.hllm.named_parameters(),
            learning_rate=optim.lr,
            part_learning_rates=self._part_rates(),
            weight_decay=optim.weight_decay,
            betas=optim.betas,
        )
        self.base_learning_rates = [group["lr"] for group in self.dense_optim.param_groups]
        self.table_optim = TableOptimizer(self.model.fused_optimizer)
        sharded = self.hllm.features.tables if self.config.parallel.overlap_tables else None
        self.table_prefetcher = TablePrefetcher(sharded) if sharded is not None else None
        self.ema = EmaWeights(experiment.averaged_parameters(), optim.ema) if optim.ema else None
        self.loss_weights = LossWeights.of(self.config)
        self.validation = experiment.loader("valid", self.config.evaluation.batch_users)
        self.loaders: dict[StageConfig, Loader | CreativeLoader] = {}
        self.schedule = RunSchedule.of(self.config, self._epoch_steps)
        self.labelled: set[int] = set()  # indices of the tasks for which some step had labels
        self.creative_alone = False  # True in a stage that trains only the creative parts
        self.step, self.early_stopping = 0, EarlyStopping(self.config.evaluation.patience)
        self.earlier_steps = 0  # steps of earlier runs whose optimizer state this run continues
        self.origin: dict[str, Any] | None = None  # checkpoint of start_from, for the log (`describe_start`)
        self.guard = StepGuard(self.config, self.rank, self.output)
        # True if the evaluation of the current step has not been done yet
        self.evaluation_pending = self.config.evaluation.at_start
        self.preemption, self.should_stop = PreemptionHandler(), False
        self.save_failed = False  # True if the pending checkpoint has failed on some rank
        self.metrics: dict[str, Any] = {}

    # ------------------------------------------------------------------ the loop

    def run(self) -> dict[str, Any]:
        """Train to the end (or until early stopping) and return the last evaluation. Collective.

        Raises:
            Preempted: a rank received SIGTERM or SIGINT; the state after the last step is saved.
            FloatingPointError: the loss or a gradient is not finite, or the embeddings have collapsed.
            ValueError: the validation AUC suggests leakage (`StepGuard.check_leakage`).
        """
        started = snapshot_weights(self.hllm, self.experiment.item_encoder)
        self._resume()
        if takes_stored_items(self.config):
            use_stored_items(self.experiment)
        with (
            self.preemption,
            self.checkpoints.storage.published_on_exit(),
            open_run_log(self.config, self.output, self.rank, self.step) as self.log,
            progress(self.schedule.total_steps, "train", self.rank == 0, unit="step", initial=self.step) as self.bar,
            self.checkpoints.wait_for_pending_save_on_error(),
        ):
            self._log_start()
            first = self.step
            try:
                self._train_segments()
            except Preempted:
                self._save_and_raise_preempted()
            except RuntimeError as error:
                error.add_note(f"after step {self.step}")
                raise
            self.checkpoints.close(self.log)
            moved = snapshot_weights(self.hllm, self.experiment.item_encoder).relative_change_since(started)
            self.log.write(
                "end", self.step, **peak_memory_bytes(), weights_moved=moved, live_steps=self._item_llm_steps()
            )
        if self.rank == 0:
            say(summary_line(self.step, self._item_llm_steps(), moved))
            names = [task.name for task in self.hllm.tasks] if self.step > first else []  # a finished run was resumed
            for line in untrained_tasks(self.config, names, self.labelled):
                say(line)
        return self.metrics | {"weights_moved": moved}

    def _train_segments(self) -> None:
        if self.evaluation_pending and self.step:  # the resumed checkpoint was saved before the evaluation of its step
            self._evaluate_and_save()
        for segment in self.schedule.from_step(self.step):
            if self.early_stopping.is_over:
                break
            self._begin_segment(segment)
            if self.evaluation_pending:  # `evaluation.at_start`, with the item source of the first stage
                self._evaluate_and_save()
            self._train_segment(segment)

    def _save_and_raise_preempted(self) -> NoReturn:
        if self.checkpoints.last_saved_step != self.step:
            self._save(None)
        self.checkpoints.close(self.log)
        self.log.write("preempted", self.step)
        raise self.preemption.preempted(f" after step {self.step}, which is saved: continue with resume: true")

    def _item_llm_steps(self) -> int:
        """Number of steps so far in which gradients reached the Item LLM."""
        learns = self.config.item_llm.enabled and self.config.item_llm.trainable
        return self.schedule.end_to_end_steps(self.step) if learns else 0

    def _train_segment(self, segment: EpochSegment) -> None:
        meter = StepMeter(self.hllm, self.experiment.text_encoders, self.peak_flops)
        with closing(self._micro_batches(segment)) as steps:
            for batches, following in with_lookahead(steps, self.table_prefetcher is not None):
                numbers, rates = self.train_step(batches, following), meter.tick(batches)
                if numbers:
                    self.log.write("step", self.step, stage=segment.stage.name, epoch=segment.epoch, **numbers, **rates)
                    self.bar.set_postfix(loss=f"{numbers['loss']:.4f}", refresh=False)
                else:
                    self.log.write("skipped", self.step, reason=self.guard.reason)
                self.bar.update(1)
                self._after_step()
                if self.early_stopping.is_over:
                    break
                meter.restart()  # evaluation and saving do not count as training time
        if self.table_prefetcher is not None:
            self.table_prefetcher.finish()

    def train_step(self, batches: list[HybridBatch], next_batches: list[HybridBatch] | None = None) -> dict[str, float]:
        """Run forward and backward of every micro-batch, then the dense optimizer's step. Collective.

        next_batches: micro-batches of the next step, on the device; the ids of the first one may be exchanged ahead.

        Returns:
            Statistics for the log; empty if the step was skipped (`StepGuard`).
        """
        self._set_learning_rates(self.schedule.learning_rate_ratio(self.step))
        batches = [batch.to(self.device, non_blocking=True) for batch in batches]
        counts, stats = step_counts(batches), StepStats()
        self.labelled |= {n for n, labelled in enumerate(counts.labelled) if labelled}
        for batch, coming in pairwise([*batches, next_batches[0] if next_batches else None]):
            assert batch is not None
            with self._no_sync() if batch is not batches[-1] else nullcontext():
                if self.table_prefetcher is not None and coming is not None:
                    self.table_prefetcher.begin(coming.features)
                with autocast(self.config, self.device):
                    output = self.model(batch)
                loss, of_batch = micro_batch_loss(output, counts, self.loss_weights, self.hllm.encodes_items)
                if self.table_prefetcher is not None:
                    self.table_prefetcher.send()
                stats += of_batch
                # All ranks make the same decision, so that no rank waits in a backward pass that others skip.
                if refused := self.guard.rejects_loss(loss):
                    break
                if (bias := self.hllm.position_bias) is not None and bias.sums is not None:
                    bias.follow(global_sum(bias.sums))
                # DDP, FSDP2 and the tables average gradients over ranks, but the loss is divided by global counts, so
                # its gradients must be summed over ranks.
                (loss * self.world_size).backward()
        # Refused: a nan norm makes `_describe` record a failure and clear the gradients of earlier micro-batches.
        norm = math.nan if refused else dense_step(self.dense_optim, self.config.optim.clip_norm)
        self.step += 1
        if self.ema is not None and math.isfinite(norm):
            self.ema.update(self.earlier_steps + self.step)
        numbers = self._describe(stats, norm, batches)
        if not numbers:
            return {}
        return numbers | {"grad_norm": norm, "lr": self.dense_optim.param_groups[0]["lr"]}

    def _describe(self, stats: StepStats, norm: float, batches: list[HybridBatch]) -> dict[str, float]:
        """Return the statistics of a step for the log, and exchange the flags of preemption and failed saves between
        the ranks. Collective."""
        stop, failed = float(self.preemption.requested), float(self.checkpoints.pending_save_failed)
        totals = replace(stats, asked_to_stop=stop, failed_saves=failed).over_ranks()
        self.should_stop, self.save_failed = totals.asked_to_stop > 0, totals.failed_saves > 0
        try:
            names = [task.name for task in self.hllm.tasks] if totals.tasks else ()
            found = describe_step(totals, norm, self.config, self.step > self.schedule.warmup_steps, names)
        except FloatingPointError as error:
            # After a refused step the gradients of its earlier micro-batches still exist.
            self.dense_optim.zero_grad(set_to_none=True)
            self.guard.record_failure(self.step, batches, str(error), may_skip=not math.isfinite(norm))
            return {}
        self.guard.record_success()
        if self.hllm.generates:
            log_scale = full_tensor(self.hllm.logit_scale.log_scale.detach())
            found["temperature"] = max(1 / MAX_SCALE, float((-log_scale).exp()))
        return found

    def _no_sync(self) -> AbstractContextManager[None]:
        """Context manager without gradient communication (DDP). FSDP2 has no such context: it communicates in every
        micro-batch, which gives the same gradients and takes longer."""
        inner = self.model._dmp_wrapped_module
        context: AbstractContextManager[None] = inner.no_sync() if hasattr(inner, "no_sync") else nullcontext()
        return context

    # ------------------------------------------------------------------ schedule

    def _epoch_steps(self, stage: StageConfig, epoch: int) -> int:
        return -(-self._loader(stage).steps(epoch) // self.config.optim.accumulate)

    def _loader(self, stage: StageConfig) -> Loader | CreativeLoader:
        if stage not in self.loaders and self.config.creative.enabled:
            self.loaders[stage] = self.experiment.creative_loader(
                "train", self.config.creative.per_batch, training=True, max_history=stage.max_history
            )
        if stage not in self.loaders:
            self.loaders[stage] = self.experiment.loader(
                "train",
                stage.batch_users or self.config.data.batch_users,
                training=True,
                max_history=stage.max_history,
                batch_item_tokens=0 if stage.batch_users else self.config.data.batch_item_tokens,
            )
        return self.loaders[stage]

    def _micro_batches(self, segment: EpochSegment) -> Generator[list[HybridBatch], None, None]:
        """Yield the micro-batches of each remaining step of the segment."""
        accumulate = self.config.optim.accumulate
        done = max(0, self.step - segment.first_step)
        with closing(self._loader(segment.stage).batches(segment.epoch, done * accumulate)) as batches:
            for _ in range(done, min(segment.steps, self.schedule.total_steps - segment.first_step)):
                yield [batch.to(self.device, non_blocking=True) for batch in islice(batches, accumulate)]

    def _begin_segment(self, segment: EpochSegment) -> None:
        """Set the item source of the stage: the Item LLM, or a cache filled with the current weights. Collective.

        Also measures statistics of items and users that have not been measured yet. A run that is resumed within a
        cached stage fills the cache again, with the same embeddings as before, because the Item LLM is not trained in
        such a stage.
        """
        self.creative_alone = segment.stage.trains == "creative"
        cached = segment.stage.item_embeddings == "cached" and self.hllm.item_llm is not None
        if segment.is_first_of_stage or (cached and self.hllm.encodes_items):
            self.experiment.use_live_items()
            if cached:
                self.experiment.use_cached_items()
            if self.hllm.needs_item_statistics:
                self.log.write("measured", self.step, **self.experiment.measure_item_statistics())
            if self.hllm.needs_user_statistics:
                self.log.write("measured", self.step, part="users", **measure_user_vectors(self.experiment))
            self.log.write("stage", self.step, name=segment.stage.name, item_embeddings=segment.stage.item_embeddings)

    def _set_learning_rates(self, ratio: float) -> None:
        others = 0.0 if self.creative_alone else ratio
        for group, rate in zip(self.dense_optim.param_groups, self.base_learning_rates, strict=True):
            group["lr"] = rate * (ratio if group["name"].startswith("creative") else others)
        self.table_optim.set_ratio(others)

    def _part_rates(self) -> dict[str, float]:
        optim, parts = self.config.optim, self.hllm.named_backbones()
        rates = {part.name: part.learning_rate for part in parts if part.learning_rate is not None}
        if any(stage.trains == "creative" for stage in self.config.stages):  # its parts need separate parameter groups
            rates = {"creative": optim.lr, "creative_head": optim.lr} | rates
        return rates

    def _log_start(self) -> None:
        if self.rank == 0:
            save_config(with_absolute_paths(self.config), self.output / "config.yaml")
        self.log.write(
            "start",
            self.step,
            world=self.world_size,
            total_steps=self.schedule.total_steps,
            parameters=sum(p.numel() for p in self.hllm.parameters()),
            matmul_peak=self.peak_flops,
            dataset=self.experiment.facts["dataset"],
            start_from=self.origin,
            item_attention=None if self.hllm.item_llm is None else str(self.hllm.item_llm.attention),
            user_attention=user_attention(self.hllm.user, self.device),
            machine=machine_info(),
        )

    # ------------------------------------------------------------------ evaluation and checkpoints

    def _after_step(self) -> None:
        """Raise for a failed save or a preemption, or evaluate or save if due after the current step. Collective."""
        every = self.config.evaluation.checkpoint_every
        self.evaluation_pending = self.step in self.schedule.evaluation_steps
        if self.save_failed:
            self.checkpoints.finish_pending_save(self.log)
        if self.should_stop:  # before an evaluation, which may take longer than the grace period: it remains pending
            raise Preempted
        if self.evaluation_pending:
            self._evaluate_and_save()
        elif every and self.step % every == 0:
            self._save(None)

    def _evaluate_and_save(self) -> None:
        self.metrics = self.evaluate()
        score = self.guard.selection_score(self.step, self.metrics)
        if score is not None:
            self.early_stopping.improves(score)
        self.evaluation_pending = False
        hashed = {"hash_tables": take_hash_counts(self.hllm)} if self.hllm.features.hash_tables else {}
        self.log.write("eval", self.step, split="valid", **self.metrics, **hashed)
        self._save(score)
        self.guard.check_leakage(self.step, self.metrics.get("auc"))

    def save_untrained(self) -> dict[str, Any]:
        """Evaluate and save the model without training: a run of 0 steps with weights that were trained elsewhere.

        Returns the evaluation. Collective.
        """
        with (
            self.checkpoints.storage.published_on_exit(),
            open_run_log(self.config, self.output, self.rank, 0) as self.log,
        ):
            self._log_start()
            self._evaluate_and_save()
            self.checkpoints.close(self.log)
        return self.metrics

    def evaluate(self) -> dict[str, Any]:
        """Compute validation metrics, with the averaged weights if the run has them. Collective."""
        with self.ema.swapped() if self.ema is not None else nullcontext(), self.experiment.evaluation_items():
            metrics: dict[str, Any] = {}
            if self.hllm.fusion.has_queries:
                metrics |= quick_metrics(score_split(self.experiment, self.validation), self.config.evaluation.auc)
            if measures_retrieval(self.experiment):
                retrieval = evaluate_retrieval(self.experiment, self.validation)
                metrics |= {"retrieval_rows" if name == "rows" else name: n for name, n in retrieval.items()}
            if self.config.creative.enabled:
                most = self.config.creative.evaluated
                scores = score_creatives(self.experiment, "valid", ("right", "null"), most=most)
                metrics |= creative_metrics(scores)
        return metrics

    def state(self) -> dict[str, Any]:
        """All tensors of a checkpoint (not copies): loading into them in place restores the trainer. Collective."""
        materialize_state(self.dense_optim)
        state: dict[str, Any] = {
            "model": self.experiment.model_state(),
            "dense": named_optimizer_state(self.dense_optim, self.hllm.named_parameters()),
            "tables": self.table_optim.state(),
        }
        return state | ({"ema": self.ema.state_dict()} if self.ema is not None else {})

    def _save(self, score: float | None) -> None:
        # The keys are those of version 0.1, whose checkpoints can be resumed: "owed" is a pending evaluation,
        # "leg_steps" the steps of the segments.
        extra = {
            "best": self.early_stopping.best if math.isfinite(self.early_stopping.best) else None,
            "stale": self.early_stopping.stale,
            "owed": self.evaluation_pending,
            "leg_steps": [segment.steps for segment in self.schedule.segments],
            "earlier_steps": self.earlier_steps,
        }
        self.checkpoints.save(self.step, self.state(), extra | self.experiment.facts, score, self.log)

    def _resume(self) -> None:
        """Load the checkpoint to resume from, if there is one. Collective."""
        if self.checkpoint is None:
            return
        self.experiment.check_origin(self.checkpoint)
        extra = load_checkpoint(self.checkpoint, self.state())
        check_saved_format(extra["config"], self.config, self.checkpoint)
        fill_new_rows(self.experiment, self.checkpoint, averages=self.ema.state_dict() if self.ema else None)
        check_schedule(self.checkpoint, extra, self.schedule.segments)
        if self.rank == 0 and (changed := changed_settings(extra, self.config)):
            say(f"resume: {self.checkpoint} continues with settings that changed since training: {'; '.join(changed)}")
        self.step = self.checkpoints.last_saved_step = extra["step"]
        self.evaluation_pending = extra.get("owed", False)
        self.early_stopping.stale = extra["stale"]
        self.early_stopping.best = -math.inf if extra["best"] is None else extra["best"]
        self.set_earlier_steps(extra.get("earlier_steps", 0))
        if (rank_extra := load_rank_extra(self.checkpoint)) is not None:
            set_rng_state(rank_extra["rng"])

    def set_earlier_steps(self, steps: int) -> None:
        """Count `steps` optimizer steps before the first one of this run, for bias corrections and averages."""
        self.earlier_steps = steps
        # The tables are updated in every micro-batch, the dense weights once per step.
        self.table_optim.set_step((steps + self.step) * self.config.optim.accumulate)
