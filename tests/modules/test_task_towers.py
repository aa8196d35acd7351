"""Towers of several tasks against a loop over experts and tasks, and the bias of positions."""

from typing import Any

import pytest
import torch

from hllm_torchrec.modules.position_bias import PositionBias
from hllm_torchrec.modules.task_towers import TaskTowers

WIDTH, HIDDEN, OUTPUTS = 6, 16, (1, 3, 1)


def towers(**options: Any) -> TaskTowers:
    torch.manual_seed(0)
    built = TaskTowers(WIDTH, HIDDEN, OUTPUTS, **options).eval()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return built


def naive(built: TaskTowers, query: torch.Tensor, item: torch.Tensor | None, evidence: torch.Tensor | None) -> list:
    rows = []
    for x in range(len(query)):
        user = query[x] if evidence is None else query[x] + built.read_evidence.weight @ evidence[x]
        user = built.user_norm(user[None])[0]
        features, dot = user, torch.zeros(())
        if item is not None:
            target = built.item_norm(item[x][None])[0]
            features, dot = torch.cat([user, target, user * target]), (user * target).mean()
        silu = torch.nn.functional.silu
        hidden = silu(built.bottom.weight @ features + built.bottom.bias)
        found, place = [], 0
        for task, number in enumerate(OUTPUTS):
            shared = hidden
            if built.gates is not None:
                own = built.gates.weight[task * built.experts : (task + 1) * built.experts]
                gate = torch.softmax(own @ features, dim=0)
                shared = sum(g * h for g, h in zip(gate, hidden.split(HIDDEN), strict=True))
            tower = silu(built.tower_weight[task] @ shared + built.tower_bias[task])
            for _ in range(number):
                value = built.out_weight[place] @ tower + built.out_bias[place]
                value = value if item is None else value + built.dot_scale[place] * dot
                if evidence is not None:
                    value = value + built.wide.weight[place] @ evidence[x] + built.wide.bias[place]
                found.append(value)
                place += 1
        rows.append(torch.stack(found))
    return rows


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("fusion", ["late", "early"])
@pytest.mark.parametrize("columns", [0, 2])
def test_outputs_and_gradients_are_those_of_a_loop(experts: int, fusion: str, columns: int) -> None:
    built = towers(fusion=fusion, experts=experts, evidence=columns)
    query, item = torch.randn(2, 5, WIDTH)
    evidence = torch.randn(5, columns) if columns else None
    inputs = query, item if fusion == "late" else None, evidence
    found, expected = built(*inputs), torch.stack(naive(built, *inputs))
    assert found.shape == (5, 5)
    torch.testing.assert_close(found, expected)
    weights = list(built.parameters())
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), weights, allow_unused=True),
        torch.autograd.grad(expected.square().sum(), weights, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_no_exposure_has_no_outputs_and_gradients_of_zero() -> None:
    built = towers(fusion="early")
    found = built(torch.empty(0, WIDTH))
    found.sum().backward()
    assert found.shape == (0, 5) and built.out_bias.grad is not None and not built.out_bias.grad.any()


def test_the_bias_is_that_of_the_values_and_its_level_keeps_the_probabilities() -> None:
    bias = PositionBias({"place": 4, "device": 3}, places=[0, 3])
    ids = torch.tensor([[1, 2], [3, 0], [1, 1]])
    logits, weights = torch.tensor([[-3.0, 0.0], [-2.0, 1.0], [-2.5, 2.0]]), torch.tensor([[1.0, 0], [2, 1], [1, 1]])
    outputs = torch.stack([logits[:, 0], torch.arange(3.0), torch.ones(3), logits[:, 1]], dim=1)

    def step(ids: torch.Tensor = ids, outputs: torch.Tensor = outputs, weights: torch.Tensor = weights) -> torch.Tensor:
        found = bias(outputs, ids, weights)
        assert bias.sums is not None
        bias.follow(bias.sums)
        return found

    assert torch.equal(step(), outputs) and not bias.mean.any(), "there is none before training"
    tables = list(bias.embedding_bags.values())
    for table in tables:
        torch.nn.init.normal_(table.weight, std=2.0)
    expected = torch.stack([tables[0].weight[place] + tables[1].weight[device] for place, device in ids.tolist()])
    found = step()
    torch.testing.assert_close(found[:, [0, 3]], logits + expected)
    assert torch.equal(found[:, 1:3], outputs[:, 1:3]), "other tasks have no bias"
    for _ in range(1500):
        step()
    shown, served = torch.sigmoid(logits + expected).detach(), torch.sigmoid(bias.eval()(outputs)[:, [0, 3]])
    torch.testing.assert_close((weights * served).sum(0), (weights * shown).sum(0), rtol=1e-3, atol=1e-4)
    plain = torch.sigmoid(logits + expected.mean(0)).detach()
    assert not torch.allclose((weights * plain).sum(0), (weights * shown).sum(0), rtol=0.05)
    kept = bias.train().mean.clone()
    step(ids[:0], outputs[:0], weights[:0])
    step(weights=0 * weights)
    assert torch.equal(bias.mean, kept)
