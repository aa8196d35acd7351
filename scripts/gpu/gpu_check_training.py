"""Checks of complete training steps on the GPU, against the CPU and against each other; see gpu_check.py.

They use the generated shop of the tests: 40 items, a tiny tokenizer, two Llamas of one and two layers.
"""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checking import Skipped, Where, check, close
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.types import HardwareConfig, KernelConfig, TopologyFactory, TrainerConfig
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from hllm_torchrec.distributed.process_group import init_distributed
from hllm_torchrec.training.trainer_setup import build_trainer
from tests.helpers.training_fixtures import config, lines

STEPS = 6
CLOSE = {"rtol": 5e-3, "atol": 1e-3}
"""Tolerance of float32 losses after some steps of AdamW, which amplifies differences of gradients near zero; the first
losses agree to 1e-4."""


def losses_of(device: torch.device, **settings: Any) -> tuple[torch.Tensor, float]:
    """Losses [STEPS] of a short run, and the median seconds of a step, without the first two steps."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = {"max_steps": STEPS, "objective__generative_weight": 0.5, "stages": [{"name": "only", "epochs": 3}]}
        chosen |= {"optim__lr": 1e-3, "optim__item_llm_lr": 1e-3}
        run = config(Path(folder) / "run", **chosen, **settings)
        build_trainer(run, device).run()
        steps = lines(Path(run.output), "step")
    times = sorted(b["time"] - a["time"] for a, b in zip(steps[1:], steps[2:]))
    return torch.tensor([line["loss"] for line in steps]), times[len(times) // 2]


def _same_as_cpu(where: Where, **settings: Any) -> dict[str, Any]:
    """Compare the losses of the same run on the CPU and on the device."""
    init_distributed()
    expected, _ = losses_of(torch.device("cpu"), **settings)
    found, seconds = losses_of(where.device, **settings)
    assert expected[0] != expected[-1], "nothing was trained"
    close([found[:1]], [expected[:1]], 1e-4, 1e-5)
    return {"losses": found.tolist(), "difference": close([found], [expected], **CLOSE), "step_seconds": seconds}


@check(90)
def step_as_on_cpu(where: Where) -> dict[str, Any]:
    """Training steps of the complete model in float32: losses on the device equal those on the CPU."""
    return _same_as_cpu(where)


@check(60)
def hstu_step_as_on_cpu(where: Where) -> dict[str, Any]:
    """The same as `step_as_on_cpu` with HSTU as user encoder, by the backend that `auto` selects (triton on CUDA)."""
    if not where.on_cuda:
        raise Skipped("in Triton's interpreter a training step takes minutes")
    shape = {"width": 32, "layers": 2, "heads": 2, "divide_by": 32, "backend": "auto"}
    return _same_as_cpu(where, user__encoder="hstu", user__shape=shape)


@check(60)
def lora_step_as_on_cpu(where: Where) -> dict[str, Any]:
    """The same as `step_as_on_cpu` with adapters (LoRA) on both LLMs."""
    if importlib.util.find_spec("peft") is None:
        raise Skipped("peft is not installed")
    return _same_as_cpu(where, item_llm__lora={"rank": 4}, user__lora={"rank": 4})


@check(60)
def bf16_step(where: Where) -> dict[str, Any]:
    """Losses of training steps under bfloat16 autocast are close to those in float32."""
    init_distributed()
    exact, _ = losses_of(where.device)
    found, seconds = losses_of(where.device, parallel__precision="bf16")
    difference = close([found], [exact], rtol=5e-2, atol=5e-2)
    return {"difference": difference, "step_seconds": seconds}


@check(60)
def fsdp_as_ddp(where: Where) -> dict[str, Any]:
    """FSDP2 for the dense parts, with DMP's tables, gives the same losses as DDP; one rank (NCCL on CUDA)."""
    init_distributed()
    expected, ddp = losses_of(where.device)
    found, fsdp = losses_of(where.device, parallel__dense="fsdp")
    backend = dist.get_backend_config()
    return {"difference": close([found], [expected], **CLOSE), "step_seconds": {"ddp": ddp, "fsdp": fsdp},
            "process_group": backend}  # fmt: skip


@check(60)
def tables_ahead(where: Where) -> dict[str, Any]:
    """`parallel.overlap_tables` does not change the losses."""
    init_distributed()
    expected, without = losses_of(where.device)
    found, ahead = losses_of(where.device, parallel__overlap_tables=True)
    return {
        "difference": close([found], [expected], rtol=1e-6, atol=1e-6),
        "step_seconds": {"off": without, "on": ahead},
    }


@check(60)
def sharding_on_cuda(where: Where) -> dict[str, Any]:
    """Options of tables that exist only on CUDA: row-wise sharding, the optimizers adam and partial_rowwise_adam."""
    if not where.on_cuda:
        raise Skipped("TorchRec's CPU tables have neither row-wise sharding nor these optimizers")
    init_distributed()
    expected, _ = losses_of(where.device)
    by_rows, _ = losses_of(where.device, features__sharding="row_wise")
    found: dict[str, Any] = {"row_wise": close([by_rows], [expected], **CLOSE)}
    for name in ("adam", "partial_rowwise_adam"):
        losses, _ = losses_of(where.device, optim__table_optimizer=name, optim__table_lr=0.01)
        assert bool(losses.isfinite().all()) and losses[-1] != expected[-1], f"{name}: {losses.tolist()}"
        found[name] = losses.tolist()
    return found


# ---------------------------------------------------------------------- TorchRec's own pipeline


def _clicks(where: Where, number: int) -> list[Batch]:
    rows = 32 if where.tiny else 4096
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(
            dense_features=torch.randn(rows, 8, generator=generator),
            sparse_features=KeyedJaggedTensor(
                keys=["a", "b"],
                values=torch.randint(0, 1000, (4 * rows,), generator=generator),
                lengths=torch.full((2 * rows,), 2),
            ),
            labels=torch.randint(0, 2, (rows,), generator=generator),
        )
        for _ in range(number)
    ]


def _dlrm(where: Where) -> DistributedModelParallel:
    """A DLRM with two sharded tables."""
    torch.manual_seed(0)
    tables = EmbeddingBagCollection(
        [
            EmbeddingBagConfig(name=f"t_{name}", embedding_dim=16, num_embeddings=1000, feature_names=[name])
            for name in "ab"
        ],
        device=torch.device("cpu"),
    )
    apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), {"lr": 0.05})
    model = DLRMTrain(DLRM(tables, 8, dense_arch_layer_sizes=[32, 16], over_arch_layer_sizes=[32, 1]))
    kernel = KernelConfig(compute_device=where.device.type)
    topology = TopologyFactory.create_topology(TrainerConfig(1, 1), HardwareConfig(), kernel)
    sharder = EmbeddingBagCollectionSharder()
    plan = EmbeddingShardingPlanner(topology=topology).plan(model, [sharder])
    return DistributedModelParallel(model, device=where.device, plan=plan, sharders=[sharder])


@check(60)
def sparse_dist_pipeline(where: Where) -> dict[str, Any]:
    """TorchRec's TrainPipelineSparseDist with a DLRM, as in the plug-in's example, against steps without a pipeline."""
    init_distributed()
    batches, models = _clicks(where, 5), [_dlrm(where), _dlrm(where)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [
        KeyedOptimizerWrapper(
            dict(in_backward_optimizer_filter(model.named_parameters())), lambda p: torch.optim.SGD(p, lr=0.1)
        )
        for model in models
    ]
    pipeline, coming = TrainPipelineSparseDist(models[0], optimizers[0], where.device), iter(batches)
    found = torch.stack([pipeline.progress(coming)[0].detach() for _ in batches])
    expected = []
    for batch in batches:
        optimizers[1].zero_grad()
        loss, _ = models[1](batch.to(where.device))
        loss.sum().backward()
        optimizers[1].step()
        expected.append(loss.detach())
    return {"losses": found.tolist(), "difference": close([found], [torch.stack(expected)], 1e-4, 1e-5)}
