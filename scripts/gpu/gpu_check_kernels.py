"""Checks of single kernels on the GPU against plain PyTorch; see gpu_check.py."""

from collections.abc import Iterator
from typing import Any

import torch
from checking import Skipped, Where, check, close, near, seconds_of
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hllm_torchrec.inference.quantization import quantize_collection
from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.modules.attention.text import TextLayout
from hllm_torchrec.modules.attention.text_backends import TEXT_BACKENDS, BackendChoice, choose_text_backend, plan_text
from hllm_torchrec.modules.encoders.base import PackedRows, Queries, pack_rows
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from hllm_torchrec.modules.hstu import triton_backend
from hllm_torchrec.modules.hstu.attention import plan_layout, pointwise_attention
from hllm_torchrec.modules.hstu.layout import AttentionRules, RelativeBias
from hllm_torchrec.modules.losses.objectives import info_nce

LR, EPS, BETAS = 0.1, 1e-6, (0.9, 0.999)

# ---------------------------------------------------------------------- tables


def _step(kind: EmbOptimType, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
    """Rows after a step of an optimizer, computed from its definition. state: name -> tensor; updated in place."""
    if kind == EmbOptimType.EXACT_SGD:
        return weight - LR * gradient
    row_wise = kind in (EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.PARTIAL_ROWWISE_ADAM)
    square = gradient.square().mean(1, keepdim=True) if row_wise else gradient.square()
    if kind in (EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD):
        state["sum"] = state.get("sum", torch.zeros_like(square)) + square
        return weight - LR * gradient / (state["sum"].sqrt() + EPS)
    state["m"] = state.get("m", torch.zeros_like(gradient)).lerp(gradient, 1 - BETAS[0])
    state["v"] = state.get("v", torch.zeros_like(square)).lerp(square, 1 - BETAS[1])
    mean, mean_square = state["m"] / (1 - BETAS[0] ** step), state["v"] / (1 - BETAS[1] ** step)
    return weight - LR * mean / (mean_square.sqrt() + EPS)


def _fused(where: Where, kind: EmbOptimType, rows: int, width: int) -> SplitTableBatchedEmbeddingBagsCodegen:
    place = (
        (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if where.on_cuda else (EmbeddingLocation.HOST, ComputeDevice.CPU)
    )
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, width, *place)],
        optimizer=kind,
        learning_rate=LR,
        eps=EPS,
        beta1=BETAS[0],
        beta2=BETAS[1],
        stochastic_rounding=False,
        bounds_check_mode=BoundsCheckMode.FATAL,
        device=where.device,
    )


def _table_differences(where: Where, kind: EmbOptimType) -> float:
    """Do two steps with FBGEMM's fused table and with plain torch on the CPU; return the largest difference."""
    rows, width, bags = 200, 16 if where.tiny else 64, 50
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator)
    lengths = torch.randint(0, 6, (bags,), generator=generator)
    ids = torch.randint(0, rows // 2, (int(lengths.sum()),), generator=generator)
    wanted = torch.randn(bags, width, generator=generator)
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    table = _fused(where, kind, rows, width)
    table.split_embedding_weights()[0].data.copy_(weight)
    touched, worst, state = ids.unique(), 0.0, dict[str, Tensor]()
    for step in (1, 2):
        plain = weight.clone().requires_grad_()
        expected = F.embedding_bag(ids, plain, offsets, mode="sum", include_last_offset=True)
        found = table(indices=ids.to(where.device), offsets=offsets.to(where.device))
        worst = max(worst, close([found], [expected], 1e-4, 1e-4))
        for output, target in ((found, wanted.to(where.device)), (expected, wanted)):
            (output - target).square().sum().backward()
        assert plain.grad is not None
        weight = weight.clone()
        weight[touched] = _step(kind, weight[touched], plain.grad[touched], state, step)
        worst = max(worst, close([table.split_embedding_weights()[0]], [weight], 1e-3, 1e-4))
    return worst


@check(60)
def table_kernels(where: Where) -> dict[str, Any]:
    """FBGEMM's fused lookup and optimizers against their definitions, for two steps; seconds of a large step."""
    kinds = (EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD)
    found: dict[str, Any] = {kind.value: _table_differences(where, kind) for kind in kinds}
    rows, width, bags = (1000, 16, 64) if where.tiny else (2_000_000, 128, 65_536)
    table = _fused(where, EmbOptimType.EXACT_ROWWISE_ADAGRAD, rows, width)
    ids = torch.randint(0, rows, (4 * bags,), device=where.device)
    offsets = torch.arange(0, 4 * bags + 1, 4, device=where.device)
    found["step_seconds"] = seconds_of(where, lambda: table(indices=ids, offsets=offsets).sum().backward())
    return found | {"rows": rows, "width": width, "bags": bags, "ids_per_bag": 4}


@check(40)
def adam_tables(where: Where) -> dict[str, Any]:
    """The table optimizers that exist only on CUDA, `adam` and `partial_rowwise_adam`, against their definitions."""
    if not where.on_cuda:
        raise Skipped("FBGEMM has these optimizers on CUDA only")
    return {
        kind.value: _table_differences(where, kind) for kind in (EmbOptimType.ADAM, EmbOptimType.PARTIAL_ROWWISE_ADAM)
    }


@check(40)
def int8_tables(where: Where) -> dict[str, Any]:
    """TorchRec's quantized tables on the device against those on the CPU; seconds of a lookup."""
    rows, width, bags = (100, 16, 8) if where.tiny else (1_000_000, 128, 65_536)
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, rows, (bags,))
    features = KeyedJaggedTensor(keys=["t"], values=ids, lengths=torch.ones(bags, dtype=torch.int64))
    expected = quantize_collection({"t": weight}, {"t": torch.qint8})(features)["t"]
    table, on_device = (
        quantize_collection({"t": weight.to(where.device)}, {"t": torch.qint8}),
        features.to(where.device),
    )
    difference = close([table(on_device)["t"]], [expected], 1e-3, 1e-3)
    error = float((expected - weight[ids]).abs().max())
    assert error < float(weight.max() - weight.min()) / 255, f"int8 rows are off by {error}"
    return {
        "difference": difference,
        "rounding": error,
        "lookup_seconds": seconds_of(where, lambda: table(on_device)),
        "rows": rows,
        "bags": bags,
    }


# ---------------------------------------------------------------------- attention


def _text_layout(where: Where, texts: int) -> TextLayout:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9 if where.tiny else 60, (texts,), generator=generator)
    return TextLayout(sorted(lengths.tolist(), reverse=True), prefix=3 if where.tiny else 10)


def _runnable(where: Where, found: dict[str, Any]) -> Iterator[str]:
    """Yield the backends of the Item LLM's attention that run here in bfloat16; write the reason for each other backend
    into `found`."""
    for name, backend in TEXT_BACKENDS.items():
        problem = backend.unavailable_reason(where.device, torch.bfloat16)
        if problem is None:
            yield name
        else:
            found[name] = f"not run: {problem}"


@check(120)
def text_attention(where: Where) -> dict[str, Any]:
    """Every backend of the Item LLM's attention in bfloat16 against padded buckets in float32; rows per second."""
    heads, kv_heads, width = (4, 2, 16) if where.tiny else (9, 3, 64)
    layout, found = _text_layout(where, 5 if where.tiny else 300), dict[str, Any]()
    rows = layout.prefix + sum(layout.lengths)
    generator = torch.Generator().manual_seed(1)
    qkv = [torch.randn(rows, h, width, generator=generator).to(where.device) for h in (heads, kv_heads, kv_heads)]
    weights = torch.randn(rows, heads, width, generator=generator).to(where.device)

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (x.to(dtype).requires_grad_() for x in qkv)
        out = plan_text(layout, TEXT_BACKENDS[backend], where.device).attend(q, k, v, width**-0.5, 0.0)
        return [out, *torch.autograd.grad((out.float() * weights).sum(), (q, k, v))]

    exact = run("buckets", torch.float32)
    for name in _runnable(where, found):
        difference = near(run(name, torch.bfloat16), exact, 0.03)
        seconds = seconds_of(where, lambda name=name: run(name, torch.bfloat16))
        found[name] = {"difference": difference, "rows_per_second": rows / seconds}
    return found | {"chosen": str(choose_text_backend("auto", where.device, torch.bfloat16)), "rows": rows}


MASKS = {
    "causal, bias": AttentionRules(None, 0, 100, 0.7, 128),
    "causal, divided by number of keys": AttentionRules(None, 0, None, 0.7, None),
    "window": AttentionRules(7, 0, None, 0.7, 9),
    "prefix": AttentionRules(None, 3, None, 0.7, 9),
    "prefix and window": AttentionRules(4, 18, None, 0.7, None),
}


def _hstu_rows(where: Where) -> PackedRows:
    """Three (tiny) or four histories, one of them empty, with four queries."""
    lengths = [5, 0, 17] if where.tiny else [300, 0, 77, 513]
    generator = torch.Generator().manual_seed(1)
    times = torch.randint(0, 10**6, (sum(lengths),), generator=generator).sort().values + 10**12
    visible = torch.tensor([4, 1, 0, lengths[-1]])
    counts = F.pad(torch.tensor([2, 1, 1] if where.tiny else [2, 1, 0, 1]).cumsum(0), (1, 0))
    asked = torch.full((4,), 2 * 10**6 + 10**12)
    device = where.device
    queries = Queries(torch.zeros(4, 1, device=device), counts.to(device), visible.to(device), asked.to(device))
    offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device)
    return pack_rows(offsets, sum(lengths), times.to(device), queries, (times + 1).to(device))


def _pointwise(where: Where, rules: AttentionRules, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Outputs of HSTU's attention, and the gradients of q, k, v and the bias tables."""
    torch.manual_seed(0)
    rows, (heads, width) = _hstu_rows(where), (1, 5) if where.tiny else (2, 64)
    bias = None
    if rules.last_bucket is not None:
        bias = RelativeBias(40, rules.last_bucket)
        for table in bias.parameters():
            torch.nn.init.normal_(table, std=0.2)
        bias = bias.to(where.device)
    q, k, v = (torch.randn(rows.positions.numel(), heads, width).to(where.device, dtype) for _ in range(3))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = pointwise_attention(*inputs, plan_layout(rows, rules, backend), bias, backend)
    weights = torch.randn(out.shape).to(where.device)
    return [out, *torch.autograd.grad((out.float() * weights).sum(), [*inputs, *(bias.parameters() if bias else ())])]


@check(150)
def hstu_kernels(where: Where) -> dict[str, Any]:
    """HSTU's Triton kernels, forward and backward, against the eager backend for every mask."""
    problem = triton_backend.unavailable_reason(where.device)
    if problem is not None:
        raise Skipped(problem)
    found: dict[str, Any] = {}
    for name, rules in list(MASKS.items())[: 2 if where.tiny else None]:
        exact = _pointwise(where, rules, "eager", torch.float32)
        found[name] = {"float32": near(_pointwise(where, rules, "triton", torch.float32), exact, 0.01)}
        if where.on_cuda:  # the interpreter has no bfloat16 products
            found[name]["bfloat16"] = near(_pointwise(where, rules, "triton", torch.bfloat16), exact, 0.03)
    return found


# ---------------------------------------------------------------------- losses and the Item LLM


@check(60)
def infonce(where: Where) -> dict[str, Any]:
    """The chunked InfoNCE against plain logits: values and gradients."""
    rows, negatives, width = (7, 9, 8) if where.tiny else (512, 2048, 128)
    torch.manual_seed(0)
    parts = [torch.randn(n, width) for n in (rows, rows, negatives)]
    ids, others = torch.randint(0, 50, (rows,)), torch.randint(0, 50, (negatives,))
    on_device = [x.to(where.device).requires_grad_() for x in parts]
    scale = torch.full((1,), 20.0, device=where.device)
    ours = info_nce(
        *on_device, scale, target_ids=ids.to(where.device), negative_ids=others.to(where.device), chunk_size=5
    )
    gradients = torch.autograd.grad(ours.loss_sum, on_device)
    plain = [x.clone().requires_grad_() for x in parts]
    prediction, positive, negative = (F.normalize(x, dim=-1) for x in plain)
    logits = (20 * prediction @ negative.T).masked_fill(ids[:, None] == others, float("-inf"))
    scores = torch.cat([20 * (prediction * positive).sum(-1, keepdim=True), logits], dim=1)
    loss = (scores.logsumexp(1) - scores[:, 0]).sum()
    expected = torch.autograd.grad(loss, plain)
    return {"difference": close([ours.loss_sum, *gradients], [loss, *expected], 1e-3, 1e-3)}


def make_item_llm(where: Where) -> tuple[ItemLLM, Tensor, Tensor]:
    """Item LLM with random weights, and packed tokens and offsets of random texts."""
    wide = (32, 48, 2, 2, 1, 50, 6) if where.tiny else (576, 1536, 6, 9, 3, 49_152, 512)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    shape = {"model_type": "llama", **dict(zip((*names, "vocab_size"), wide[:6], strict=True))}
    torch.manual_seed(0)
    model = ItemLLM(build_backbone(None, shape)).to(where.device)
    lengths = torch.randint(0, 6 if where.tiny else 48, (wide[6],))
    tokens = torch.randint(0, wide[5], (int(lengths.sum()),))
    return model, tokens.to(where.device), F.pad(lengths.cumsum(0), (1, 0)).to(where.device)


@check(90)
def item_llm_packed(where: Where) -> dict[str, Any]:
    """Items packed into one sequence against each item alone, in bfloat16, with every attention that runs here."""
    model, tokens, offsets = make_item_llm(where)
    few = min(24, offsets.numel() - 1)
    tokens, offsets = tokens[: int(offsets[few])], offsets[: few + 1]
    found: dict[str, Any] = {}

    def encode(own: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.no_grad(), torch.autocast(where.device.type, dtype, enabled=dtype is not torch.float32):
            rows: Tensor = model(own, ends)
        return rows.float()

    exact = encode(tokens, offsets, torch.float32)
    for name in _runnable(where, found):
        model.attention = BackendChoice(TEXT_BACKENDS[name], "checked")
        packed = encode(tokens, offsets, torch.bfloat16)
        alone = [
            encode(tokens[int(a) : int(b)], torch.tensor([0, int(b - a)], device=where.device), torch.bfloat16)
            for a, b in zip(offsets, offsets[1:])
        ]
        cosine = F.cosine_similarity(packed, torch.cat(alone), dim=-1).min()
        assert cosine > 0.995, f"{name}: packed and alone have a cosine of {cosine:.4f}"
        found[name] = {
            "least_cosine_to_alone": float(cosine),
            "least_cosine_to_float32": float(F.cosine_similarity(packed, exact, dim=-1).min()),
        }
    return found
