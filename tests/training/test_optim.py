"""Optimizers: who is trained how, the schedule on both kinds of optimizer, clipping, averaging."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from hllm_torchrec.embedding.optimizers import TableOptimizer
from hllm_torchrec.models.ema import EmaWeights
from hllm_torchrec.training.optim import (
    clip_grad_norm,
    dense_optimizer,
    materialize_state,
    named_optimizer_state,
    warmup_cosine,
)
from tests.helpers.distributed import run_ranks
from tests.helpers.small_models import TABLE_LEARNING_RATE, TwoTables, batch, shard


class Parts(nn.Module):
    """A model with every kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.item_llm = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(5, 4),
                "head": nn.Linear(4, 4),
                "item_embedding_projection": nn.Linear(4, 4),
            }
        )
        self.item_llm_extra = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.item_token = nn.Parameter(torch.randn(1, 1, 4))
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def rates_and_decays(optimizer: torch.optim.AdamW, model: nn.Module) -> dict[str, tuple[float, float]]:
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def test_each_part_has_its_rate_and_only_matrices_decay() -> None:
    model = Parts()
    optimizer = dense_optimizer(
        model.named_parameters(),
        learning_rate=1e-3,
        part_learning_rates={"item_llm": 1e-4, "item_llm.head": 1e-5},
        weight_decay=0.1,
    )
    assert rates_and_decays(optimizer, model) == {
        "item_llm.embed_tokens.weight": (1e-4, 0.0),
        "item_llm.head.weight": (1e-5, 0.1),
        "item_llm.head.bias": (1e-5, 0.0),
        "item_llm.item_embedding_projection.weight": (1e-4, 0.1),
        "item_llm.item_embedding_projection.bias": (1e-4, 0.0),
        "item_llm_extra.weight": (1e-3, 0.1),
        "item_llm_extra.bias": (1e-3, 0.0),
        "norm.weight": (1e-3, 0.0),
        "norm.bias": (1e-3, 0.0),
        "item_token": (1e-3, 0.0),
        "logit_scale": (1e-3, 0.0),
    }


@pytest.mark.parametrize(
    ("name", "decays"),
    [
        ("item_llm.model.embed_tokens.weight", False),
        ("bert.embeddings.word_embeddings.weight", False),
        ("features.ebc.embedding_bags.t0.weight", False),
        ("position_embedding.weight", False),
        ("embedding_merge.0.weight", True),
        ("timestamp_embeddings_mlp.0.weight", True),
    ],
)
def test_tables_are_known_by_their_names(name: str, decays: bool) -> None:
    optimizer = dense_optimizer([(name, nn.Parameter(torch.ones(3, 4)))], learning_rate=1.0, weight_decay=0.1)
    assert (optimizer.param_groups[0]["weight_decay"] > 0) == decays


def test_a_step_without_gradient_decays_as_said() -> None:
    model = nn.Linear(3, 3)
    before = copy.deepcopy(model.state_dict())
    optimizer = dense_optimizer(model.named_parameters(), learning_rate=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias, before["bias"])


def test_a_prefix_of_nothing_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"no parameter is under 'item_lm' \(did you mean 'item_llm'\?\); parts: fr"):
        dense_optimizer(Parts().named_parameters(), learning_rate=1.0, part_learning_rates={"item_lm": 1.0})


def test_nothing_to_train_is_refused() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="there is no dense parameter to train"):
        dense_optimizer(frozen.named_parameters(), learning_rate=1.0)


# --- state -----------------------------------------------------------------------------------------------


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()


def test_materialising_changes_nothing_but_that_state_exists() -> None:
    model = nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    optimizer, twins = (dense_optimizer(m.named_parameters(), learning_rate=0.1) for m in (model, twin))
    gradient = torch.ones(2, 3)
    model.weight.grad = gradient
    materialize_state(optimizer)
    assert model.weight.grad is gradient and model.bias.grad is None
    assert torch.equal(model.weight, twin.weight) and torch.equal(model.bias, twin.bias)
    state = named_optimizer_state(optimizer, model.named_parameters())
    assert {name: sorted(tensors) for name, tensors in state.items()} == {
        name: ["exp_avg", "exp_avg_sq", "step"] for name in ("weight", "bias")
    }
    assert all(not t.any() for tensors in state.values() for t in tensors.values())
    train(model, optimizer, 3)
    train(twin, twins, 3)
    assert torch.equal(model.weight, twin.weight) and torch.equal(model.bias, twin.bias)


def test_materialising_leaves_existing_state_alone() -> None:
    model = nn.Linear(3, 2)
    optimizer = dense_optimizer(model.named_parameters(), learning_rate=0.1)
    train(model, optimizer, 2)
    del optimizer.state[model.bias]
    before = copy.deepcopy(named_optimizer_state(optimizer, model.named_parameters()))
    materialize_state(optimizer)
    after = named_optimizer_state(optimizer, model.named_parameters())
    torch.testing.assert_close(after["weight"], before["weight"], rtol=0, atol=0)
    assert after["bias"]["step"] == 0


def test_state_loaded_in_place_restores_the_optimizer() -> None:
    model = nn.Linear(3, 2)
    optimizer = dense_optimizer(model.named_parameters(), learning_rate=0.1)
    train(model, optimizer, 2)
    twin = copy.deepcopy(model)
    other = dense_optimizer(twin.named_parameters(), learning_rate=0.1)
    materialize_state(other)
    saved = named_optimizer_state(optimizer, model.named_parameters())
    for name, tensors in named_optimizer_state(other, twin.named_parameters()).items():
        for key, tensor in tensors.items():
            tensor.copy_(saved[name][key])
    train(model, optimizer, 2)
    train(twin, other, 2)
    assert torch.equal(model.weight, twin.weight)


# --- schedule --------------------------------------------------------------------------------------------


def test_the_schedule_rises_falls_and_stays() -> None:
    ratios = [warmup_cosine(step, 4, 12, 0.1) for step in range(14)]
    assert ratios[:4] == [0.25, 0.5, 0.75, 1.0]
    assert ratios[4] == 1.0
    assert ratios[8] == pytest.approx(0.1 + 0.9 / 2)
    assert all(a > b for a, b in zip(ratios[4:12], ratios[5:13]))
    assert ratios[12] == ratios[13] == pytest.approx(0.1)


def test_a_schedule_without_warmup_or_all_warmup() -> None:
    assert warmup_cosine(0, 0, 10, 0.0) == 1.0
    assert [warmup_cosine(step, 2, 2, 0.5) for step in range(3)] == [0.5, 1.0, 1.0]
    assert warmup_cosine(3, 2, 2, 0.5) == 0.5


# --- sharded tables --------------------------------------------------------------------------------------


def table_movement(change: str) -> tuple[float, list[str], list[float]]:
    """How far the tables go in a backward pass after a change of rate; the dense names; the groups' rates."""
    model = shard(TwoTables())
    before = whole_tables(model)
    tables = TableOptimizer(model.fused_optimizer)
    if change == "ratio":
        tables.set_ratio(0.5)
        tables.set_ratio(0.25)  # of the full rate, not of the last
    if change == "zero":
        tables.set_ratio(0.0)
    tables.set_step(3)
    model(batch()).sum().backward()
    moved = math.sqrt(sum((a - b).square().sum().item() for a, b in zip(whole_tables(model), before)))
    dense = dense_optimizer(model.named_parameters(), learning_rate=1.0)
    names = rates_and_decays(dense, model)
    return moved, sorted(names), [group["lr"] for group in model.fused_optimizer.param_groups]


def whole_tables(model: Any) -> list[Tensor]:
    state = model.state_dict()
    shards = [state[key].local_shards() for key in sorted(state) if "embedding_bags" in key]
    return [shard.tensor.clone() for of_table in shards for shard in of_table]


def all_table_movements() -> dict[str, tuple[float, list[str], list[float]]]:
    return {change: table_movement(change) for change in ("none", "ratio", "zero")}


def test_tables_follow_the_rate_they_are_given() -> None:
    (movements,) = run_ranks(all_table_movements, 1)
    full, names, rates = movements["none"]
    assert full > 0.1
    assert rates == [TABLE_LEARNING_RATE]
    assert names == ["over.bias", "over.weight"]  # the tables are not the dense optimizer's
    assert movements["ratio"][0] == pytest.approx(full / 4, rel=1e-5)
    assert movements["ratio"][2] == [TABLE_LEARNING_RATE / 4]
    assert movements["zero"][0] == 0.0


def two_rank_table_movement() -> tuple[float, list[float]]:
    moved, _, rates = table_movement("ratio")
    return moved, rates


@pytest.mark.slow
def test_tables_on_two_ranks_follow_too() -> None:
    for moved, rates in run_ranks(two_rank_table_movement, 2):
        assert moved > 0.0
        assert rates == [TABLE_LEARNING_RATE / 4]


# --- clipping --------------------------------------------------------------------------------------------


def small_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1), nn.Linear(1, 2))


def inputs() -> Tensor:
    return torch.arange(12.0).view(4, 3) / 5


def clipped_gradients(kind: str, max_norm: float) -> tuple[float, list[Tensor], list[Tensor]]:
    """Norm and clipped gradients of the first step, and the weights after two, under a wrapper or none."""
    model = small_model()
    if kind == "mixed":  # the bias of model[2] has one element: rank 1 has none of it
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model[2], mesh=mesh)
    wrapped = DistributedDataParallel(model) if kind == "ddp" else model
    optimizer = dense_optimizer(model.named_parameters(), learning_rate=0.1, weight_decay=0.1)
    norms, gradients = [], []
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(inputs()).square().mean().backward()
        norms.append(clip_grad_norm(model.parameters(), max_norm).item())
        gradients.append([whole(p.grad) for p in model.parameters()])
        optimizer.step()
    return norms[0], gradients[0], [whole(p.detach()) for p in model.parameters()]


CLIPPING = [(kind, max_norm) for kind in ("mixed", "ddp") for max_norm in (0.5, 0.0)]


def all_clipped_gradients() -> list[tuple[float, list[Tensor], list[Tensor]]]:
    return [clipped_gradients(kind, max_norm) for kind, max_norm in CLIPPING]


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


@pytest.fixture(scope="module")
def clipped_on_two_ranks() -> list[list[tuple[float, list[Tensor], list[Tensor]]]]:
    return run_ranks(all_clipped_gradients, 2)


@pytest.mark.parametrize(("kind", "max_norm"), CLIPPING)
def test_two_ranks_clip_and_step_as_one_process_does(
    clipped_on_two_ranks: list[list[tuple[float, list[Tensor], list[Tensor]]]], kind: str, max_norm: float
) -> None:
    model = small_model()
    model(inputs()).square().mean().backward()
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or 1e9)
    alone = clipped_gradients("plain", max_norm)
    for rank in clipped_on_two_ranks:
        norm, gradients, weights = rank[CLIPPING.index((kind, max_norm))]
        assert norm == pytest.approx(expected.item(), rel=1e-6)
        assert norm > 0.5
        torch.testing.assert_close(gradients, [whole(p.grad) for p in model.parameters()], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(weights, alone[2], rtol=1e-4, atol=1e-5)


def test_parameters_without_gradient_have_norm_zero() -> None:
    assert clip_grad_norm(small_model().parameters(), 1.0).item() == 0.0


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    model = small_model()
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    assert math.isnan(clip_grad_norm(model.parameters(), 1.0).item())


# --- averaged weights ------------------------------------------------------------------------------------


def test_the_average_is_that_of_the_formula_and_swaps_in_and_out() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = EmaWeights(model.named_parameters(), decay=0.9)
    expected = 1.0
    for step in (1, 2, 1000):
        with torch.no_grad():
            model.weight.fill_(float(step))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert decay == 0.9
    with pytest.raises(RuntimeError, match="evaluation failed"), ema.swapped():
        assert model.weight.item() == pytest.approx(expected)
        raise RuntimeError("evaluation failed")
    assert model.weight.item() == 1000.0


def test_the_average_takes_trainable_weights_only_and_loads_in_place() -> None:
    model = Parts()
    ema = EmaWeights(model.named_parameters(), decay=0.5)
    assert set(ema.state_dict()) == {name for name, p in model.named_parameters() if p.requires_grad}
    ema.state_dict()["logit_scale"].fill_(7.0)
    with ema.swapped():
        assert model.logit_scale.item() == 7.0


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="ema decay is .*; it must be at least 0 and less than 1"):
        EmaWeights(nn.Linear(1, 1).named_parameters(), decay)
