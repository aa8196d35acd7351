"""Timings on a GPU: kernels, the Item LLM, and the effect of torch.compile; see gpu_check.py."""

from collections.abc import Callable
from typing import Any

import torch
from checking import Skipped, Where, check, close, seconds_of
from gpu_check_kernels import make_item_llm
from gpu_check_training import CLOSE, losses_of

from hllm_torchrec.distributed.process_group import init_distributed
from hllm_torchrec.models.flops import measured_matmul_peak
from hllm_torchrec.modules.attention.text_backends import choose_text_backend
from hllm_torchrec.modules.encoders.item_llm import EncodingCounts, ItemLLM
from hllm_torchrec.modules.losses.objectives import info_nce


@check(60)
def infonce_speed(where: Where) -> dict[str, Any]:
    """Seconds and peak memory of InfoNCE, forward and backward, with the paper's 28,672 negatives, at width 2,048."""
    if not where.on_cuda:
        raise Skipped("scripts/bench/bench_loss.py times it on a CPU")
    rows, negatives, width = 2560, 28_672, 2048
    parts = [torch.randn(n, width, device=where.device).requires_grad_() for n in (rows, rows, negatives)]
    scale, ids = torch.full((1,), 20.0, device=where.device), torch.arange(rows, device=where.device)
    others = torch.arange(negatives, device=where.device) + rows

    def run() -> None:
        out = info_nce(*parts, scale, target_ids=ids, negative_ids=others)
        torch.autograd.grad(out.loss_sum, parts)

    torch.cuda.reset_peak_memory_stats()
    return {"seconds": seconds_of(where, run), "peak_bytes": torch.cuda.max_memory_allocated(), "rows": rows,
            "negatives": negatives, "width": width}  # fmt: skip


@check(120)
def item_llm_speed(where: Where) -> dict[str, Any]:
    """Tokens per second of the Item LLM (width 576, 6 layers), forward and backward; share of the measured peak."""
    if not where.on_cuda:
        raise Skipped("scripts/bench/bench_item_llm.py times it on a CPU")
    model, tokens, offsets = make_item_llm(where)
    lengths = (offsets[1:] - offsets[:-1]).cpu() + 1
    work = EncodingCounts(
        lengths.numel(), int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum()), int(lengths.sum())
    )
    found: dict[str, Any] = {"tokens": work.tokens}

    def run(dtype: torch.dtype) -> None:
        model.attention = choose_text_backend("auto", where.device, dtype)
        with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
            loss = model(tokens, offsets).float().square().sum()
        loss.backward()
        model.zero_grad(set_to_none=True)

    for dtype in (torch.float32, torch.bfloat16):
        found[str(dtype).removeprefix("torch.")] = _speed(where, model, work, lambda dtype=dtype: run(dtype), dtype)
    for layer in model.backbone.layers:
        layer.compile(dynamic=True)
    found["bfloat16, compiled"] = _speed(where, model, work, lambda: run(torch.bfloat16), torch.bfloat16)
    return found


def _speed(
    where: Where, model: ItemLLM, work: EncodingCounts, run: Callable[[], None], dtype: torch.dtype
) -> dict[str, float]:
    seconds = seconds_of(where, run)
    peak = measured_matmul_peak(where.device, dtype, ((4096, 4096, 4096), (8192, 2048, 8192)))
    return {
        "seconds": seconds,
        "tokens_per_second": work.tokens / seconds,
        "share_of_peak": 3 * model.flops(work) / seconds / peak,
        "peak_flops": peak,
    }


@check(150)
def hstu_speed(where: Where) -> dict[str, Any]:
    """Seconds of HSTU's backends (triton, eager, compiled) at width 512 in bfloat16: 32 users with lengths by a power
    law, and 16 users of equal length."""
    if not where.on_cuda:
        raise Skipped("times in Triton's interpreter are meaningless")
    from bench_hstu import on_cuda

    return {
        "power_1000": on_cuda([max(1, 1000 // (n + 1)) for n in range(32)], 512, 10),
        "alike_1000": on_cuda([1000] * 16, 512, 10),
    }


@check(120)
def compiled_step(where: Where) -> dict[str, Any]:
    """Losses with `parallel.compile` differ from those without it only by rounding; seconds of a step of both."""
    if not where.on_cuda:
        raise Skipped("scripts/bench/bench_item_llm.py compares it on a CPU")
    init_distributed()
    expected, eager = losses_of(where.device)
    found, compiled = losses_of(where.device, parallel__compile=True)
    return {"difference": close([found], [expected], **CLOSE), "step_seconds": {"eager": eager, "compiled": compiled}}
