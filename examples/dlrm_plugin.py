"""A plain TorchRec DLRM training script with stored vectors put in: the lines between `# hllm >` and `# hllm <`.

    torchrun --nproc_per_node 2 examples/dlrm_plugin.py --clicks clicks.parquet --items ITEM_STORE --users USER_STORE

clicks.parquet has the columns user, item (raw ids), label, and any number of numeric ones. Without --items and --users
it is the script that its owner had. --output DIR saves the sharded model, and exports it for serving as one program.
"""

import argparse
import json
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.types import KernelConfig, TopologyFactory, TrainerConfig
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection, DLRMTrain
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.streamable import Pipelineable

# hllm >
from hllm_torchrec.downstream.plugin import VectorLookup, append_vectors, plug_into

# hllm <
ROWS, WIDTH = 1000, 16
KINDS = {
    "dlrm": (DLRM, {}),
    "dcn": (DLRM_DCN, {"dcn_num_layers": 2, "dcn_low_rank_dim": 8}),
    "projection": (
        DLRM_Projection,
        {"interaction_branch1_layer_sizes": [2 * WIDTH], "interaction_branch2_layer_sizes": [2 * WIDTH]},
    ),
}


@dataclass
class Batch(Pipelineable):
    """Numbers [B, n], one bag per id, labels [B]."""

    dense_features: torch.Tensor
    sparse_features: KeyedJaggedTensor
    labels: torch.Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """A copy on `device`."""
        return Batch(*(value.to(device, non_blocking=non_blocking) for value in vars(self).values()))

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses these tensors."""
        for value in vars(self).values():
            value.record_stream(stream)

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory."""
        return Batch(*(value.pin_memory() for value in vars(self).values()))


class Clicks:
    """Batches of a file for this rank; every rank has as many."""

    def __init__(self, path: str, batch_size: int) -> None:
        table = pq.read_table(path)
        self.rows, self.batch_size = table.num_rows, batch_size
        self.ids = {name: table[name].to_pylist() for name in ("user", "item")}
        self.labels = torch.tensor(table["label"].to_pylist(), dtype=torch.float32)
        numeric = [name for name in table.column_names if name not in ("user", "item", "label")]
        columns = [torch.tensor(table[name].to_pylist(), dtype=torch.float32) for name in numeric]
        self.dense = torch.stack([torch.ones(self.rows), *columns], dim=1)
        self.lookups: dict[str, VectorLookup] = {}  # hllm: "item" and "user", where given

    def __iter__(self) -> Iterator[Batch]:
        rank, world = dist.get_rank(), dist.get_world_size()
        for step in range(self.rows // (self.batch_size * world)):
            first = (step * world + rank) * self.batch_size
            yield self.batch(slice(first, first + self.batch_size))

    def batch(self, rows: slice) -> Batch:
        """Some rows, ids hashed to the tables' rows."""
        hashed = [zlib.crc32(str(key).encode()) % ROWS for ids in self.ids.values() for key in ids[rows]]
        sparse = KeyedJaggedTensor(
            list(self.ids), torch.tensor(hashed), lengths=torch.ones(len(hashed), dtype=torch.int32)
        )
        dense = self.dense[rows]
        # hllm >
        found = [lookup(self.ids[name][rows]) for name, lookup in self.lookups.items()]
        dense = append_vectors(dense, *found)
        # hllm <
        return Batch(dense, sparse, self.labels[rows])


def build(args: argparse.Namespace, clicks: Clicks, device: torch.device) -> DLRMTrain:
    """The model; `device`: that of its tables, "meta" before sharding."""
    tables = EmbeddingBagCollection(
        [
            EmbeddingBagConfig(name=f"t_{name}", embedding_dim=WIDTH, num_embeddings=ROWS, feature_names=[name])
            for name in clicks.ids
        ],
        device=device,
    )
    apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), {"lr": args.lr})
    kind, options = KINDS[args.model]
    options = {**options, "dense_arch_layer_sizes": [32, WIDTH], "over_arch_layer_sizes": [32, 1]}
    # hllm >
    widths = [lookup.width for lookup in clicks.lookups.values()]
    if widths:
        dlrm = plug_into(kind, tables, clicks.dense.shape[1], widths, args.way, **options)
    else:  # hllm <
        dlrm = kind(tables, clicks.dense.shape[1], **options)
    return DLRMTrain(dlrm)


def shard(model: DLRMTrain, device: torch.device) -> DistributedModelParallel:
    """The model, planned and sharded."""
    sharder = EmbeddingBagCollectionSharder()
    topology = TopologyFactory.create_topology(
        TrainerConfig(world_size=dist.get_world_size(), local_world_size=dist.get_world_size()),
        kernel_config=KernelConfig(compute_device=device.type),
    )
    plan = EmbeddingShardingPlanner(topology=topology).collective_plan(model, [sharder], dist.group.WORLD)
    return DistributedModelParallel(model, device=device, plan=plan, sharders=[sharder])


class Served(torch.nn.Module):
    """A trained model as it is served: one id per feature, probabilities out."""

    def __init__(self, model: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, dense_features: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Map dense features [B, n] and ids [features, B] to probabilities [B]."""
        ones = torch.ones(ids.numel(), dtype=torch.int32, device=ids.device)
        features = KeyedJaggedTensor(self.names, ids.reshape(-1), lengths=ones)
        return torch.sigmoid(self.model(dense_features, features)).squeeze(1)


def save(model: DistributedModelParallel, args: argparse.Namespace, clicks: Clicks, device: torch.device) -> None:
    """Write OUTPUT/checkpoint from all ranks' shards; rank 0 exports OUTPUT/model.pt2 from it and checks it."""
    output = Path(args.output)
    dcp.save({"model": model.state_dict()}, checkpoint_id=output / "checkpoint")
    batch = clicks.batch(slice(0, args.batch_size))
    model.eval()
    with torch.no_grad():
        _, (_, logits, _) = model(batch.to(device))  # collective
    if dist.get_rank():
        return
    # hllm >
    identities = {name: lookup.identity for name, lookup in clicks.lookups.items()}  # for VectorLookup, where it serves
    (output / "stores.json").write_text(json.dumps(identities))
    # hllm <
    whole = build(args, clicks, torch.device("cpu"))
    dcp.load({"model": whole.state_dict()}, checkpoint_id=output / "checkpoint", no_dist=True)
    served = Served(whole.model.eval(), list(clicks.ids))
    inputs = (batch.dense_features, batch.sparse_features.values().reshape(len(clicks.ids), -1))
    sizes = ({0: torch.export.Dim.AUTO}, {1: torch.export.Dim.AUTO})
    torch.export.save(torch.export.export(served, inputs, dynamic_shapes=sizes, strict=False), output / "model.pt2")
    program = torch.export.load(output / "model.pt2").module()
    off = (program(*inputs) - torch.sigmoid(logits.cpu())).abs().max().item()
    if off > 1e-5:
        raise RuntimeError(f"{output / 'model.pt2'}: its scores differ from those of the sharded model by {off}")
    print(f"{output / 'model.pt2'}: scores as the sharded model, largest difference {off:.1e}")


def main(argv: list[str]) -> float:
    """Train; returns the mean loss of the last epoch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clicks", required=True)
    parser.add_argument("--model", choices=list(KINDS), default="dlrm")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--output", metavar="DIR", help="save and export the trained model there")
    # hllm >
    parser.add_argument("--items")
    parser.add_argument("--users")
    parser.add_argument("--way", choices=["dense", "slots"], default="slots")
    # hllm <
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    clicks = Clicks(args.clicks, args.batch_size)
    # hllm >
    stores = {"item": args.items, "user": args.users}
    clicks.lookups = {name: VectorLookup(path) for name, path in stores.items() if path}
    # hllm <
    model = shard(build(args, clicks, torch.device("meta")), device)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    optimizer = KeyedOptimizerWrapper(dense, lambda parameters: torch.optim.Adagrad(parameters, lr=args.lr))
    pipeline = TrainPipelineSparseDist(model, optimizer, device)
    mean = 0.0
    for epoch in range(args.epochs):
        losses, batches = [], iter(clicks)
        while True:
            try:
                losses.append(pipeline.progress(batches)[0])
            except StopIteration:
                break
        mean = float(torch.stack(losses).mean())
        print(f"rank {dist.get_rank()}, epoch {epoch}: mean loss {mean:.4f}")
    if args.output:
        pipeline.detach()  # its forward pass wants batches that the pipeline has sent ahead
        save(model, args, clicks, device)
    # hllm >
    for name, lookup in clicks.lookups.items():
        print(
            f"rank {dist.get_rank()}: {lookup.unknown_share:.1%} of {lookup.num_requested} {name} ids are not in "
            f"the store"
        )
    # hllm <
    return mean


if __name__ == "__main__":
    main(sys.argv[1:])
