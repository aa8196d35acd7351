"""ID-only baseline: `torchrec.models.dlrm.DLRM` with inputs from IDs, user features, context, time and the history.

The inputs from the history before the exposure are the liked and the disliked items, each as one pooled bag, and the
numeric features. Tables are sharded and updated as in the main model.

Legend: B rows of a batch, O outputs of all tasks.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hllm_torchrec.checkpoint.load import load_checkpoint, save_checkpoint
from hllm_torchrec.common.arrays import Ints
from hllm_torchrec.common.atomic_files import remove_folder
from hllm_torchrec.common.progress import progress
from hllm_torchrec.data.dataset import Dataset, base_rate
from hllm_torchrec.data.predictions import PredictionColumns, join_columns
from hllm_torchrec.distributed import coordination
from hllm_torchrec.distributed.collectives import any_rank, global_sum
from hllm_torchrec.distributed.wrappers import unwrap_model
from hllm_torchrec.downstream.dlrm_config import DLRMConfig, VectorPlacement
from hllm_torchrec.downstream.dlrm_data import DLRMBatch, DLRMData, Window
from hllm_torchrec.downstream.plugin import PluggedDLRM, plug_into
from hllm_torchrec.embedding.optimizers import TableSettings, apply_table_optimizer
from hllm_torchrec.embedding.sharding import distribute, plan_table_sharding
from hllm_torchrec.embedding.tables import initialize_tables
from hllm_torchrec.evaluation.scoring import quick_metrics, task_columns
from hllm_torchrec.models.tasks import binary_outputs
from hllm_torchrec.modules.expert_over_arch import ExpertOverArch
from hllm_torchrec.modules.position_bias import PositionBias
from hllm_torchrec.training.early_stopping import EarlyStopping
from hllm_torchrec.training.optim import dense_optimizer, dense_step

SCORED_ROWS = 8192
"""Number of rows per batch in scoring."""

T = TypeVar("T")


class BiasedDLRM(nn.Module):
    """A DLRM with a position bias on the outputs of binary tasks; outside of training, a constant replaces the bias."""

    def __init__(self, dlrm: DLRM | PluggedDLRM, position_bias: PositionBias) -> None:
        super().__init__()
        self.dlrm, self.position_bias = dlrm, position_bias

    def forward(
        self,
        dense_features: Tensor,
        sparse_features: KeyedJaggedTensor,
        bias_ids: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Outputs [B, O]; bias_ids, weights: see `PositionBias`."""
        outputs: Tensor = self.position_bias(self.dlrm(dense_features, sparse_features), bias_ids, weights)
        return outputs


def build_dlrm(
    config: DLRMConfig,
    tables: dict[str, int],
    start: Sequence[float],
    dense: int,
    widths: Sequence[int] = (),
    way: VectorPlacement = "slots",
    vector_dropout: float = 0.0,
    outputs: Sequence[int] | None = None,
) -> DLRM | PluggedDLRM:
    """Build the model with tables on the meta device; sharding allocates them.

    Args:
        config: sizes.
        tables: sparse feature -> rows of its table.
        start: initial values of the last biases [O], those of a constant prediction of each task.
        outputs: number of outputs of each task; None: one each.
        dense: number of dense features without stored vectors.
        widths, way, vector_dropout: settings of stored vectors after the dense features; see `plugin.plug_into`.
    """
    sharers = ["item", "liked", "disliked"] if config.share_items else ["item"]
    collection = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=f"{name}_table",
                embedding_dim=config.width,
                num_embeddings=rows,
                feature_names=sharers if name == "item" else [name],
                pooling=PoolingType.MEAN,
            )
            for name, rows in tables.items()
            if name not in sharers[1:]  # their features use the table of `item`
        ],
        device=torch.device("meta"),
    )
    over = [*config.top, len(start)]
    sizes = {"dense_arch_layer_sizes": [*config.bottom, config.width], "over_arch_layer_sizes": over}
    if widths:
        model = plug_into(DLRM, collection, dense, list(widths), way, vector_dropout, **sizes)
    else:
        model = DLRM(collection, dense_in_features=dense, **sizes)
    # The initial predictions are then near the base rates, which avoids large losses in the first steps.
    inner = _dlrm_of(model)
    if config.towers == "mmoe":
        width = next(inner.over_arch.parameters()).shape[1]
        inner.over_arch = ExpertOverArch(width, config.top, outputs or [1] * len(start), config.experts)
        inner.over_arch.initialize_bias(start)
        return model
    with torch.no_grad():
        inner.over_arch.model[-1].bias.copy_(torch.tensor(start))
    return model


def _dlrm_of(model: DLRM | PluggedDLRM | BiasedDLRM) -> DLRM:
    """Return the DLRM inside a model, or the model itself."""
    if isinstance(model, BiasedDLRM):
        model = model.dlrm
    return model.dlrm if isinstance(model, PluggedDLRM) else model


def shard_dlrm(
    model: DLRM | PluggedDLRM | BiasedDLRM, config: DLRMConfig, device: torch.device
) -> DistributedModelParallel:
    """Shard the tables over the ranks, replicate the other parameters, and initialize the tables. Collective."""
    settings = TableSettings(config.table_lr, config.shard_from_rows)
    apply_table_optimizer(_dlrm_of(model).sparse_arch.embedding_bag_collection, settings)
    wrapped = distribute(model, plan_table_sharding(model, settings, device), device)
    initialize_tables(wrapped, config.seed, config.init_scale)
    return wrapped


class DLRMTrainer:
    """Trains and scores the DLRM on this rank. All methods are collective.

    Args:
        data: builds the batches of `dataset` and `config`; None: batches without stored vectors.
        way, vector_dropout: settings of stored vectors, if the batches contain any; see `plugin.plug_into`.

    Raises:
        ConfigError: the configuration has an unknown feature.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: DLRMConfig,
        device: torch.device,
        data: DLRMData | None = None,
        way: VectorPlacement = "slots",
        vector_dropout: float = 0.0,
    ) -> None:
        self.config, self.device = config, device
        self.data = DLRMData(dataset, config) if data is None else data
        torch.manual_seed(config.seed)
        self.tasks, rate = self.data.tasks, base_rate(dataset)
        first = math.log(rate / (1 - rate))
        start = [first, *(value for task in self.tasks[1:] for value in task.start)]
        dense, widths = self.data.dense_width, self.data.widths
        outputs = [task.outputs for task in self.tasks]
        model: DLRM | PluggedDLRM | BiasedDLRM = build_dlrm(
            config, self.data.tables(), start, dense, widths, way, vector_dropout, outputs
        )
        self.position_bias: PositionBias | None = None
        if config.position_bias:
            self.position_bias = PositionBias(self.data.bias_rows, binary_outputs(self.tasks))
            model = BiasedDLRM(model, self.position_bias)
        self.model = shard_dlrm(model, config, device)
        self._scales = torch.tensor([[task.center, task.scale] for task in self.tasks], device=device)
        self.dense = dense_optimizer(
            unwrap_model(self.model).named_parameters(),
            learning_rate=config.lr,
            weight_decay=config.weight_decay,
        )

    def fit(self, checkpoints: Path) -> dict[str, float]:
        """Train with early stopping on the validation AUC; loads the best epoch's weights and returns its metrics.

        If the AUC is undefined (all labels are equal), early stopping uses the log loss.

        checkpoints: directory for the best epoch's weights, which is emptied first.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        coordination.run_on_rank_zero(lambda: remove_folder(checkpoints))
        best: dict[str, float] = {}
        stopping, kept = EarlyStopping(self.config.patience), checkpoints
        with progress(self.config.epochs, "dlrm", coordination.rank() == 0, unit="epoch") as bar:
            for epoch in range(1, self.config.epochs + 1):
                loss = self.train_epoch(epoch)
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"dlrm: the loss of epoch {epoch} is {loss}: lower dlrm.lr or dlrm.table_lr"
                    )
                metrics = quick_metrics(self.score("valid")) | {"epoch": epoch, "train_loss": loss}
                # EarlyStopping maximizes, so the log loss is negated.
                score = -metrics["log_loss"] if math.isnan(metrics["auc"]) else metrics["auc"]
                bar.set_postfix(valid_auc=f"{metrics['auc']:.4f}", refresh=False)
                bar.update(1)
                if stopping.improves(score):
                    best = metrics
                    kept = save_checkpoint(checkpoints, epoch, self._state(), metrics, keep_last=1)
                if stopping.is_over:
                    break
        load_checkpoint(kept, self._state())
        return best

    def train_epoch(self, epoch: int) -> float:
        """Train for one pass over the training part; returns the mean loss of its exposures."""
        total = torch.zeros(2, dtype=torch.float64)
        no_rows = self.data.batch(self.data.empty_window(), np.empty(0, np.int64))
        for batch in _pad_to_equal_steps(self.data.training_batches(epoch), no_rows):
            total += self.train_step(batch.to(self.device))
        # Ranks have different numbers of rows, so the mean is computed from global sums.
        loss, rows = global_sum(total).tolist()
        return loss / max(rows, 1.0)

    def train_step(self, batch: DLRMBatch) -> Tensor:
        """Take one step on the weighted sum of the tasks' mean losses over the global batch.

        Returns:
            [2]: this rank's part of the loss multiplied by the number of exposures of all ranks, and this rank's number
                of exposures; both are summed over ranks and steps to compute the mean loss.
        """
        outputs = self._outputs(batch)
        counts = global_sum(torch.cat([torch.tensor([float(len(outputs))]), batch.task_weights.sum(0).cpu()]))
        rows, weights = counts[0].item(), counts[1:].tolist()
        sums = self._losses(outputs, batch)
        shares = [task.weight / (weight or 1.0) for task, weight in zip(self.tasks, weights, strict=True)]
        loss = torch.stack([own * share for own, share in zip(sums, shares, strict=True)]).sum()
        if self.position_bias is not None and self.position_bias.sums is not None:
            self.position_bias.follow(global_sum(self.position_bias.sums))
        # DDP averages gradients over ranks, so the factor world_size turns the average of sums into the global sum.
        (loss * coordination.world_size()).backward()
        dense_step(self.dense, self.config.clip_norm)
        total = sum(value.item() * (share * rows) for value, share in zip(sums, shares, strict=True))
        return torch.tensor([total, len(outputs)], dtype=torch.float64)

    def _losses(self, outputs: Tensor, batch: DLRMBatch) -> list[Tensor]:
        """For each task, the weighted sum [] of its losses over this rank's exposures, computed as in `HLLM`."""
        parts = list(outputs.split([task.outputs for task in self.tasks], dim=1))
        if batch.logit_offset is not None:
            parts[0] = parts[0] + batch.logit_offset[:, None]
        # Undefined labels are NaN, and NaN times their weight 0 would be NaN.
        labels, found = batch.task_labels.nan_to_num(), []
        for k, (task, predicted) in enumerate(zip(self.tasks, parts, strict=True)):
            losses = task.losses(predicted, labels[:, k], self._scales[k])
            found.append((losses * batch.task_weights[:, k]).sum())
        return found

    @torch.no_grad()
    def score(self, split: str) -> PredictionColumns:
        """Return this rank's predictions of a split."""
        self.model.eval()
        none, parts = (self.data.empty_window(), np.empty(0, np.int64)), []
        for window, rows in _pad_to_equal_steps(_rows_in_order(self.data.windows(split)), none):
            batch = self.data.batch(window, rows)
            outputs = self._outputs(batch.to(self.device)).float().cpu()
            logits = outputs[:, 0].double().numpy()
            probabilities = 1 / (1 + np.exp(-logits))
            columns = window.histories.prediction_columns(logits, probabilities, ~self.data.item_is_known, rows)
            parts.append(columns | task_columns(self.tasks, self._scales.cpu(), batch.task_labels, outputs))
        self.model.train()
        return join_columns(parts)

    def _outputs(self, batch: DLRMBatch) -> Tensor:
        """Outputs [B, O] of all tasks; the first is the logit of the first label."""
        bias = []
        if self.position_bias is not None:
            binary = [place for place, task in enumerate(self.tasks) if task.is_binary]
            bias = [batch.bias_ids, batch.task_weights[:, binary]]
        outputs: Tensor = self.model(batch.dense_features, batch.sparse_features, *bias)
        return outputs

    def _state(self) -> dict[str, dict[str, Tensor]]:
        return {"model": self.model.state_dict()}


def _rows_in_order(windows: Iterable[Window]) -> Iterator[tuple[Window, Ints]]:
    """Yield (window, rows) of all exposures in batches; at least one batch, possibly without rows."""
    for window in windows:
        for at in range(0, max(window.exposures, 1), SCORED_ROWS):
            yield window, np.arange(at, min(at + SCORED_ROWS, window.exposures))


def _pad_to_equal_steps(batches: Iterable[T], filler: T) -> Iterator[T]:
    """Yield this rank's batches, then `filler` until all ranks have finished, because forward passes are collective."""
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        if not any_rank(batch is not None, torch.device("cpu")):
            return
        yield filler if batch is None else batch
