"""Hybrid features against a loop over slots with plain look-ups."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hllm_torchrec.modules.features.hybrid import ACTION_GATE, HybridFeatures, table_config
from hllm_torchrec.modules.features.timestamps import TIME_FEATURES

WIDTH, TIME_WIDTH = 6, 3
SLOTS: list[dict[str, Any]] = [
    {"item_id": [4], "genres": [1, 2, 2], "action": [2], "gate": [2], "time": (2024, 2, 29, 23, 59, 58)},
    {"item_id": [0], "genres": [], "action": [1], "gate": [1], "time": (1970, 1, 1, 0, 0, 0)},
    {"item_id": [], "genres": [3], "action": [0], "gate": [], "time": (2099, 12, 31, 12, 30, 1)},
    {"item_id": [4], "genres": [1], "action": [], "gate": [], "time": None},  # a target of late fusion
    {"item_id": [], "genres": [], "action": [], "gate": [], "time": None},
]
TABLES = {"item_id": 6, "genres": 4, "action": 3}
OF_ITEMS = ("item_id", "genres")


def kjt(names: list[str], depth: int) -> KeyedJaggedTensor:
    bags: dict[str, list[list[int]]] = {name: [slot[name] for slot in SLOTS] for name in names}
    bags[ACTION_GATE] = [slot["gate"] for slot in SLOTS]
    for part, name in enumerate(TIME_FEATURES[:depth]):
        bags[name] = [[] if slot["time"] is None else [slot["time"][part]] for slot in SLOTS]
    every = [bag for name in bags for bag in bags[name]]
    return KeyedJaggedTensor(
        keys=list(bags),
        values=torch.tensor([v for bag in every for v in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bag in every], dtype=torch.int64),
        stride=len(SLOTS),
    )


def features(tables: dict[str, int], depth: int, numeric: int = 0, gate: bool = False) -> HybridFeatures:
    torch.manual_seed(0)
    return HybridFeatures(
        tables,
        WIDTH,
        time_depth=depth,
        time_width=TIME_WIDTH,
        numeric=numeric,
        item_features=OF_ITEMS,
        gate_rows=3 if gate else 0,
        scale=0.5,
    )


def naive(module: HybridFeatures, names: list[str], depth: int, numeric: Tensor | None, items: Tensor | None) -> Tensor:
    """Algorithm 1, Table 12 and the gate, slot by slot."""
    weights = dict(module.named_parameters())

    def look_up(table: str, row: int) -> Tensor:
        return weights[f"tables.embedding_bags.{table}.weight"][row]

    rows = []
    for number, slot in enumerate(SLOTS):
        x = torch.zeros(WIDTH) if items is None else items[number]
        for name in names:
            for value in slot[name] if name in OF_ITEMS else []:
                x = x + look_up(name, value)
        if module.gated:
            for action in slot["gate"]:
                x = x * (1 + look_up(ACTION_GATE, action))
        for name in names:
            for value in slot[name] if name not in OF_ITEMS else []:
                x = x + look_up(name, value)
        if depth and slot["time"] is not None:
            parts = [look_up(f, v) for f, v in zip(TIME_FEATURES[:depth], slot["time"])]
            hidden = F.silu(
                torch.cat(parts) @ weights["merge_time.merge.0.weight"].T + weights["merge_time.merge.0.bias"]
            )
            x = x + hidden @ weights["merge_time.merge.2.weight"].T + weights["merge_time.merge.2.bias"]
        if numeric is not None:
            x = x + weights["numeric.weight"] @ numeric[number]
        rows.append(x)
    return torch.stack(rows)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(
    ("names", "depth", "with_numeric", "with_items"),
    [
        (["item_id", "genres", "action"], 6, True, True),
        (["item_id", "genres"], 6, True, False),
        (["item_id", "genres"], 6, False, False),
        (["item_id", "genres"], 0, False, True),
        (["genres"], 3, False, False),
        (["action"], 0, False, True),
        ([], 6, True, False),
        ([], 1, False, False),
        ([], 0, True, True),
    ],
)
def test_every_slot_is_the_sum_of_its_look_ups(
    names: list[str], depth: int, with_numeric: bool, with_items: bool, gate: bool
) -> None:
    module = features({name: TABLES[name] for name in names}, depth, 2 if with_numeric else 0, gate)
    numeric = random(1, len(SLOTS), 2) if with_numeric else None
    items = random(3, len(SLOTS), WIDTH).requires_grad_() if with_items else None
    ours = module(kjt(names, depth), numeric, items)
    theirs = naive(module, names, depth, numeric, items)
    torch.testing.assert_close(ours, theirs)
    weights = random(2, *theirs.shape)
    parameters = [*module.parameters(), *([] if items is None else [items])]
    if not parameters:
        assert not ours.any()
        return
    gradients = [
        torch.autograd.grad((y * weights).sum(), parameters, retain_graph=True, materialize_grads=True)
        for y in (ours, theirs)
    ]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_empty_bags_add_nothing_not_even_a_bias() -> None:
    module = features(TABLES, 6)
    assert not module(kjt(list(TABLES), 6), None)[4].any()


def test_without_tables_time_or_numbers_the_features_are_zero() -> None:
    module = features({}, 0)
    assert module.tables is None and not list(module.parameters())
    x = module(kjt([], 0), None)
    assert x.shape == (len(SLOTS), WIDTH) and not x.any()


def test_no_slots_give_no_rows_and_a_graph() -> None:
    module = features(TABLES, 6, numeric=2, gate=True)
    none = torch.empty(0, dtype=torch.int64)
    keys = [*TABLES, ACTION_GATE, *TIME_FEATURES]
    bags = KeyedJaggedTensor(keys=keys, values=none, lengths=none, stride=0)
    x = module(bags, torch.empty(0, 2), torch.empty(0, WIDTH))
    assert x.shape == (0, WIDTH)
    x.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_table_starts_uniform_within_its_scale() -> None:
    assert table_config("x", 7, 3, 0.25).get_weight_init_min() == -0.25
    tables = features(TABLES, 0).tables
    assert tables is not None
    weights = tables.embedding_bags["item_id"].weight
    assert 0.3 < weights.abs().max().item() <= 0.5
