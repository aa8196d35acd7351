"""SASRec and LiGR, packed, against torch.nn's own layers that read one user at a time."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hllm_torchrec.modules.encoders.base import Queries, UserEncoder
from hllm_torchrec.modules.encoders.ligr import LiGR, LiGRLayer
from hllm_torchrec.modules.encoders.sasrec import SASRec, SASRecBlock
from hllm_torchrec.modules.encoders.shapes import LiGRShape, SASRecShape
from hllm_torchrec.modules.encoders.softmax import PackedSelfAttention
from tests.helpers.fixtures import enlarge

SHAPE = SASRecShape(width=8, layers=2, heads=2, hidden=12, max_positions=10)
ENCODERS = ["public", "pre", "post", "ligr"]
LENGTHS, VISIBLE = [4, 0, 7, 1], [[4, 1, 1], [0], [3], []]


def build(name: str, dropout: float = 0.0) -> UserEncoder:
    torch.manual_seed(0)
    if name == "ligr":
        model: UserEncoder = LiGR(LiGRShape(width=8, layers=2, heads=2, max_positions=10, dropout=dropout))
    else:
        model = SASRec(replace(SHAPE, norm=name, dropout=dropout))  # type: ignore[arg-type]
    enlarge(model, 2.0)
    return model.eval()


def batch() -> tuple[Tensor, Tensor, Queries]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(LENGTHS), 8, generator=generator).requires_grad_()
    queries = Queries(
        torch.randn(5, 8, generator=generator).requires_grad_(),
        torch.tensor([0, 3, 4, 5, 5]),
        torch.tensor([v for row in VISIBLE for v in row]),
        torch.zeros(5, dtype=torch.int64),
    )
    return x, torch.tensor([0, *LENGTHS]).cumsum(0), queries


def torch_attention(attention: PackedSelfAttention, asking: Tensor, seen: Tensor) -> Tensor:
    """`nn.MultiheadAttention` with the same weights and a causal mask."""
    parts = (attention.query, attention.key, attention.value)
    return F.multi_head_attention_forward(
        asking[:, None],
        seen[:, None],
        seen[:, None],
        embed_dim_to_check=8,
        num_heads=2,
        in_proj_weight=torch.cat([p.weight for p in parts]),
        in_proj_bias=torch.cat([p.bias for p in parts]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=attention.out.weight,
        out_proj_bias=attention.out.bias,
        attn_mask=nn.Transformer.generate_square_subsequent_mask(len(asking)),
    )[0][:, 0]


def torch_layer(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, LiGRLayer):
        normed = F.layer_norm(x, (8,), layer.attention_norm.weight, layer.attention_norm.bias)
        mixed = torch_attention(layer.attention, normed, normed)
        x = x + torch.sigmoid(F.linear(x, layer.attention_gate.weight, layer.attention_gate.bias)) * mixed
        normed = F.layer_norm(x, (8,), layer.forward_norm.weight, layer.forward_norm.bias)
        ffn = layer.feed_forward
        inner = F.silu(normed @ ffn.gate.weight.T) * (normed @ ffn.up.weight.T)
        gate = torch.sigmoid(F.linear(x, layer.forward_gate.weight, layer.forward_gate.bias))
        return x + gate * (inner @ ffn.out.weight.T)
    assert isinstance(layer, SASRecBlock)
    if layer.norm == "public":
        asking = layer.attention_norm(x)
        x = layer.forward_norm(asking + torch_attention(layer.attention, asking, x))
        return x + layer.feed_forward[3](torch.relu(layer.feed_forward[0](x)))
    stock = nn.TransformerEncoderLayer(8, 2, 12, 0.0, layer_norm_eps=1e-8, norm_first=layer.norm == "pre")
    parts = (layer.attention.query, layer.attention.key, layer.attention.value)
    weights = {
        "self_attn.in_proj_weight": torch.cat([p.weight for p in parts]),
        "self_attn.in_proj_bias": torch.cat([p.bias for p in parts]),
        "self_attn.out_proj.weight": layer.attention.out.weight,
        "self_attn.out_proj.bias": layer.attention.out.bias,
    }
    for theirs, ours in (
        ("linear1", layer.feed_forward[0]),
        ("linear2", layer.feed_forward[3]),
        ("norm1", layer.attention_norm),
        ("norm2", layer.forward_norm),
    ):
        weights |= {f"{theirs}.weight": ours.weight, f"{theirs}.bias": ours.bias}
    mask = nn.Transformer.generate_square_subsequent_mask(len(x))
    return torch.func.functional_call(stock, weights, (x[:, None],), {"src_mask": mask})[:, 0]


def one_by_one(model: Any, x_TD: Tensor, x_QD: Tensor) -> tuple[Tensor, Tensor]:
    def run(rows: Tensor) -> Tensor:
        rows = rows + model.positions.weight[: len(rows)]
        for layer in model.layers:
            rows = torch_layer(layer, rows)
        return model.final_norm(rows)

    h, q, number = [], [], 0
    for user, visible in zip(x_TD.split(LENGTHS), VISIBLE):
        h += [run(user)] if len(user) else []
        for seen in visible:
            q.append(run(torch.cat([user[:seen], x_QD[number : number + 1]]))[-1])
            number += 1
    return torch.cat(h), torch.stack(q)


@pytest.mark.parametrize("name", ENCODERS)
def test_packed_users_equal_torchs_own_layers_that_read_one_at_a_time(name: str) -> None:
    model = build(name)
    x, offsets, queries = batch()
    found = []
    for h, q in (model(x, offsets, None, queries), one_by_one(model, x, queries.x_QD)):
        generator = torch.Generator().manual_seed(2)
        loss = torch.stack([(y * torch.randn(y.shape, generator=generator)).sum() for y in (h, q)]).sum()
        found.append((h, q, *torch.autograd.grad(loss, [x, queries.x_QD, *model.parameters()])))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_nothing_of_a_later_position_reaches_an_earlier_one(name: str) -> None:
    model = build(name)
    x, offsets, queries = batch()
    before, asked_before = model(x, offsets, None, queries)
    changed = x.detach().clone()
    changed[8, 0] += 1.0  # the third user's position 4, rows 4 to 10
    after, asked_after = model(changed, offsets, None, queries)
    differs = ((after - before).abs().amax(-1) > 1e-6).nonzero().flatten().tolist()
    assert 8 in differs and set(differs) <= {8, 9, 10}
    torch.testing.assert_close(asked_after, asked_before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_no_rows_run_the_layers_and_keep_a_graph_to_every_weight(name: str) -> None:
    model = build(name)
    x = torch.empty(0, 8, requires_grad=True)
    h, _ = model(x, torch.zeros(1, dtype=torch.int64))
    (h.sum() * 0).backward()
    assert h.shape == (0, 8) and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ENCODERS)
def test_dropout_acts_in_training_alone(name: str) -> None:
    x, offsets, _ = batch()
    model = build(name, dropout=0.5)
    assert torch.equal(model(x, offsets)[0], build(name)(x, offsets)[0])
    model.train()
    assert not torch.equal(model(x, offsets)[0], model(x, offsets)[0])


@pytest.mark.parametrize("name", ["public", "ligr"])
def test_positions_from_the_end_are_those_from_the_start_turned_round(name: str) -> None:
    model, turned = build(name), build(name)
    turned.count_from_end = True
    x, offsets, queries = batch()
    assert model.positions is not None and turned.positions is not None
    for start, end in zip(offsets.tolist(), offsets.tolist()[1:]):
        with torch.no_grad():
            turned.positions.weight[: end - start] = model.positions.weight[: end - start].flip(0)
        alone = turned(x[start:end], torch.tensor([0, end - start]))[0]
        torch.testing.assert_close(alone, model(x, offsets)[0][start:end], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="^count_from: .end.: positions are counted from the end.* write start"):
        turned(x, offsets, None, queries)


def test_a_wrong_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match="^norm: 'rms': must be one of public, pre, post"):
        SASRec(replace(SHAPE, norm="rms"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^heads: 3: does not divide the width 8"):
        LiGR(LiGRShape(width=8, layers=1, heads=3))


def test_operations_are_those_of_the_matrix_products() -> None:
    attention, hidden = 4 * 8 * 8, 2 * 8 * 12
    assert build("public").flops(3, 5) == 2 * (3 * 2 * (attention + hidden) + 5 * 4 * 8)
    assert build("ligr").flops(3, 5) == 2 * (3 * 2 * (attention + 3 * 8 * 32 + 2 * 64) + 5 * 4 * 8)


@pytest.mark.parametrize("make", [SASRec, LiGR])
def test_attention_weights_have_a_dropout_of_their_own(make: type[SASRec] | type[LiGR]) -> None:
    """None: that of the other parts; training then differs from evaluation by it alone."""
    shape = SASRecShape if make is SASRec else LiGRShape
    x, offsets, _ = batch()

    def is_random(**dropouts: float) -> bool:
        model = make(shape(width=8, layers=1, heads=2, max_positions=10, **dropouts))  # type: ignore[arg-type]
        enlarge(model, 2.0)
        outputs = [module(x, offsets)[0] for module in (model.eval(), model.train())]
        return not torch.equal(*outputs)

    assert not is_random(dropout=0.0) and is_random(dropout=0.0, attention_dropout=0.5)
    plain = make(shape(width=8, layers=1, dropout=0.5))  # type: ignore[arg-type]
    fused = make(shape(width=8, layers=1, dropout=0.5, attention_dropout=0.0))  # type: ignore[arg-type]
    assert [model.layers[0].attention.dropout for model in (plain, fused)] == [0.5, 0.0]
