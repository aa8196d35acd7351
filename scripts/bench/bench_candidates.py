"""Scoring candidates with a cached history in micro-batches (M-FALCON), against scoring without a cache.

    python scripts/bench/bench_candidates.py [--quick] [--out FILE]

One request of one user, for the User LLM (a Llama) and HSTU (research preset: relative position and time bias):

- ours: the history is encoded and its keys and values are cached, then candidates are scored, `micro_batch` at a time.
  The time includes encoding the history; `kept` is a request that uses the cache of an earlier request.
- each: one forward pass per candidate, with history and candidate in one sequence. A few passes are timed, and their
  median is multiplied by the number of candidates (all passes have equal shapes).
- packed: history and all candidates in one sequence with a dense mask, without a cache. Left out for more
  than 6,000 rows.

For the LLM, `each` and `packed` run unmodified transformers with SDPA. The bench stops if the outputs of any side
differ from ours. Ratios are for 1,000 history events and 1,024 candidates: `candidates_vs_*` includes encoding the
history, `candidates_kept_vs_*` does not, `candidates_memory_vs_packed_*` is packed / ours in peak bytes of tensors.
`widths` has the ratios at other widths of the encoder: the larger the width, the more of the time is in the linear
layers, which `packed` also computes only once.
"""

import argparse
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_step import LLAMA
from benchmarking import alternate, arguments, keep_large_buffers, matmul_peak, medians, ratio, report, say
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.modules.attention.keys_values import HistoryCache
from hllm_torchrec.modules.encoders.backbone import backbone_flops
from hllm_torchrec.modules.encoders.shapes import HSTUShape
from hllm_torchrec.modules.encoders.user_llm import UserLLM
from hllm_torchrec.modules.history_cache import answer, read_history
from hllm_torchrec.modules.hstu.eager import block_attention
from hllm_torchrec.modules.hstu.layer import HSTU
from hllm_torchrec.modules.hstu.layout import time_bucket

LAYERS, HEADS, MICRO_BATCH = 4, 4, 256
WIDTH, WIDTHS = 128, (64, 256, 512)
HEADLINE = (1000, 1024)
HISTORIES, CANDIDATES = (100, 300, 1000, 4000), (64, 256, 1024, 4096, 16384)
QUICK = (100, 1000), (64, 1024)
TINY_HEADLINE = (12, 8)
PACKED_ROWS = 6000
"""Largest number of rows of a sequence with a dense mask."""
MANY = 5_000_000
"""Number of pairs of rows (the cost of packed) from which only two repeats are timed."""


class Side(ABC):
    """A user encoder with two methods of scoring candidates without a cache: `each` and `packed`."""

    def __init__(self, width: int, longest: int) -> None:
        self.width, self.longest = width, longest

    def inputs(self, history: int, candidates: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """Random x [N, D], times [N], candidates [m, D] and the request's time; N: history, m: candidates."""
        generator = torch.Generator().manual_seed(history)
        gaps = torch.exp(torch.rand(history + 1, generator=generator) * 8 + 4).long()
        times = gaps.cumsum(0)
        x = torch.randn(history + candidates, self.width, generator=generator)
        return x[:history], times[:-1], x[history:], int(times[-1])

    @abstractmethod
    def flops(self, tokens: int, keys: int) -> float:
        """FLOPs of `tokens` rows that see `keys` keys in total."""

    @abstractmethod
    def each(self, x: Tensor, times: Tensor, candidate: Tensor, time: int) -> Tensor:
        """Output [1, D] of one candidate, by a separate pass."""

    @abstractmethod
    def packed(self, x: Tensor, times: Tensor, candidates: Tensor, time: int) -> Tensor:
        """Outputs [m, D] of all candidates, in one sequence with a dense mask."""


class LlamaSide(Side):
    """The User LLM; `each` and `packed` use an unmodified model of transformers with the same weights."""

    def __init__(self, width: int, longest: int) -> None:
        super().__init__(width, longest)
        shape = LLAMA | {
            "hidden_size": width,
            "intermediate_size": width * 8 // 3,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "vocab_size": 8,
            "max_position_embeddings": longest,
        }
        torch.manual_seed(0)
        self.encoder = UserLLM(build_backbone(None, shape, word_embeddings=False)).eval()
        self.stock = build_backbone(None, shape, word_embeddings=False, attention="sdpa").eval()
        self.stock.load_state_dict(self.encoder.backbone.state_dict())

    def flops(self, tokens: int, keys: int) -> float:
        """FLOPs of `tokens` rows that see `keys` keys in total."""
        return backbone_flops(self.encoder.backbone, tokens, keys)

    def each(self, x: Tensor, times: Tensor, candidate: Tensor, time: int) -> Tensor:
        """Output [1, D] of one candidate, by a separate pass."""
        output = self.stock(inputs_embeds=torch.cat([x, candidate])[None], use_cache=False)
        return output.last_hidden_state[0, -1:]

    def packed(self, x: Tensor, times: Tensor, candidates: Tensor, time: int) -> Tensor:
        """Outputs [m, D] of all candidates, in one sequence with a dense mask."""
        history, positions = x.shape[0], torch.arange(x.shape[0] + candidates.shape[0]).clamp(max=x.shape[0])
        output = self.stock(
            inputs_embeds=torch.cat([x, candidates])[None],
            attention_mask=looks(history, candidates.shape[0])[None, None],
            position_ids=positions[None],
            use_cache=False,
        )
        return output.last_hidden_state[0, history:]


class HSTUSide(Side):
    """HSTU; `each` is the encoder's forward pass over one sequence, `packed` runs its layers with a dense mask."""

    def __init__(self, width: int, longest: int) -> None:
        super().__init__(width, longest)
        torch.manual_seed(0)
        self.encoder = HSTU(
            HSTUShape(width=width, layers=LAYERS, heads=HEADS, max_positions=longest, divide_by=1000)
        ).eval()

    def flops(self, tokens: int, keys: int) -> float:
        """FLOPs of `tokens` rows that see `keys` keys in total."""
        return self.encoder.flops(tokens, keys)

    def each(self, x: Tensor, times: Tensor, candidate: Tensor, time: int) -> Tensor:
        """Output [1, D] of one candidate, by a separate pass."""
        offsets = torch.tensor([0, x.shape[0] + 1])
        return self.encoder(torch.cat([x, candidate]), offsets, torch.cat([times, torch.tensor([time])]))[0][-1:]

    def packed(self, x: Tensor, times: Tensor, candidates: Tensor, time: int) -> Tensor:
        """Outputs [m, D] of all candidates, in one sequence with a dense mask."""
        history, number, rules = x.shape[0], candidates.shape[0], self.encoder.rules
        places = torch.arange(history + number).clamp(max=history)
        moments = torch.cat([times, times.new_full((number,), time)])
        hidden = ~looks(history, number)[None]
        distance = (places[:, None] - places)[None].clamp(min=0)
        assert rules.last_bucket is not None
        bucket = time_bucket(moments[:, None] - moments, rules.last_bucket)[None]
        rows = self.encoder.add_positions(torch.cat([x, candidates]), places)
        for layer in self.encoder.layers:
            u, v, q, k = layer.project(rows)
            bias = layer.bias(distance, bucket)
            seen = block_attention(q[None], k[None], v[None], hidden, bias, rules.alpha)[0] / rules.divide_by
            rows = layer.combine(rows, u, seen.flatten(1), places)
        return rows[history:]


SIDES: dict[str, type[LlamaSide] | type[HSTUSide]] = {"llm": LlamaSide, "hstu": HSTUSide}


def looks(history: int, candidates: int) -> Tensor:
    """Mask [S, S] bool, True where a row sees a key: causal history; candidates see the history and themselves."""
    total = history + candidates
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    mask[history:, history:] = torch.eye(candidates, dtype=torch.bool)
    return mask


@torch.no_grad()
def measure(side: LlamaSide | HSTUSide, history: int, candidates: int, repeats: int, sample: int) -> dict[str, Any]:
    """Measure one point: seconds of every side; those of `each` are extrapolated from `sample` passes per round."""
    x, times, queries, time = side.inputs(history, candidates)
    kept = read_history(side.encoder, x, times)

    def ours(cache: HistoryCache | None = None) -> Tensor:
        return answer(side.encoder, cache or read_history(side.encoder, x, times), queries, time, None, MICRO_BATCH)

    passes = min(sample, candidates)
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: run_all(ours),
        "kept": lambda: run_all(lambda: ours(kept)),
        "each": lambda: run_all(*(partial(side.each, x, times, queries[i : i + 1], time) for i in range(passes))),
    }
    expected = ours()
    check(side.each(x, times, queries[-1:], time), expected[-1:])
    packs = history + candidates <= PACKED_ROWS
    if packs:
        check(side.packed(x, times, queries, time), expected)
        sides["packed"] = lambda: run_all(lambda: side.packed(x, times, queries, time))
    measured = alternate(sides, repeats, warmup=0)  # the checks have warmed up
    seconds = medians(measured)
    seconds["each"] *= candidates / passes
    keys = history * (history + 1) // 2 + candidates * (history + 1)
    return {
        "history": history,
        "candidates": candidates,
        "seconds": seconds,
        "times": measured,
        "each_extrapolated_from": passes,
        "packed_left_out": None if packs else f"{history + candidates} rows behind a dense mask, over {PACKED_ROWS}",
        "flops": side.flops(history + candidates, keys),
        "cache_bytes": kept.nbytes,
    }


def run_all(*passes: Callable[[], Tensor]) -> None:
    """Run the passes and return None, so that `alternate` times the call."""
    for one in passes:
        one()


def check(found: Tensor, expected: Tensor) -> None:
    """Raise AssertionError if the outputs of two sides differ."""
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@torch.no_grad()
def memory(side: LlamaSide | HSTUSide, history: int, candidates: int) -> dict[str, Any]:
    """Peak bytes of tensors in a request with a cached history, by micro-batch and by number of candidates; in one that
    also reads the history; and packed."""
    x, times, queries, time = side.inputs(history, 4 * candidates)
    cache = read_history(side.encoder, x, times)

    def request(number: int, micro_batch: int) -> int:
        return peak_bytes(lambda: answer(side.encoder, cache, queries[:number], time, micro_batch=micro_batch))

    sizes = [max(1, candidates // divisor) for divisor in (16, 4, 1)]
    least = min(MICRO_BATCH, sizes[1])
    return {
        "history": history,
        "cache_bytes": cache.nbytes,
        "by_micro_batch": {str(size): request(candidates, size) for size in sizes},
        "by_candidates": {str(number): request(number, least) for number in (candidates, 4 * candidates)},
        "micro_batch": least,
        "whole_request": peak_bytes(
            lambda: answer(
                side.encoder, read_history(side.encoder, x, times), queries[:candidates], time, micro_batch=least
            )
        ),
        "packed": peak_bytes(lambda: side.packed(x, times, queries[:candidates], time)),
    }


def peak_bytes(run: Callable[[], Tensor]) -> int:
    """Peak bytes of the tensors that are allocated during a call, beyond those that existed before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    ordered = sorted(events, key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in ordered), initial=0))


def ratios_of(name: str, point: dict[str, Any]) -> dict[str, float]:
    """The ratios of one point."""
    times, parts = point["times"], {"each": point["candidates"] / point["each_extrapolated_from"], "packed": 1.0}
    return {
        f"candidates_{kind}vs_{other}_{name}": ratio(times[other], times[ours], parts[other])
        for other in ("each", "packed")
        for ours, kind in (("ours", ""), ("kept", "kept_"))
    }


def run(name: str, options: argparse.Namespace, peak: float) -> tuple[dict[str, float], dict[str, Any]]:
    """Measure all points of one encoder; return its ratios and all other results."""
    headline = TINY_HEADLINE if options.tiny else HEADLINE
    histories, numbers = ((6, 12), (3, 8)) if options.tiny else QUICK if options.quick else (HISTORIES, CANDIDATES)
    repeats, sample = (1, 2) if options.tiny else (5, 3) if options.quick else (5, 5)
    longest = histories[-1] + 1
    side = SIDES[name](16 if options.tiny else WIDTH, longest)
    points = []
    for history, candidates in itertools.product(histories, numbers):
        point = measure(
            side, history, candidates, repeats if (history + candidates) ** 2 < MANY else min(repeats, 2), sample
        )
        points.append(point)
        say(f"{name} {history} x {candidates}: {point['seconds']}")
    [head] = [point for point in points if (point["history"], point["candidates"]) == headline]
    ratios = ratios_of(name, head)
    found: dict[str, Any] = {"points": points, "memory": memory(side, *headline)}
    found["matmul_share"] = head["flops"] / head["seconds"]["ours"] / peak
    ratios[f"candidates_memory_vs_packed_{name}"] = found["memory"]["packed"] / found["memory"]["whole_request"]
    widths = () if options.tiny else (512,) if options.quick else WIDTHS
    found["widths"] = {}
    for width in widths:
        point = measure(SIDES[name](width, longest), *headline, 1 if options.quick else repeats, sample)
        found["widths"][str(width)] = {"seconds": point["seconds"], "ratios": ratios_of(name, point)}
        say(f"{name}, width {width}: {point['seconds']}")
    return ratios, found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the bench."""
    options: argparse.Namespace = arguments(__doc__).parse_args(argv)
    peak = matmul_peak(seconds=0.1 if options.tiny else 1.0)
    ratios: dict[str, float] = {}
    encoders: dict[str, Any] = {}
    for name in SIDES:
        found, encoders[name] = run(name, options, peak)
        ratios |= found
    history, candidates = TINY_HEADLINE if options.tiny else HEADLINE
    shapes = {
        "history": history,
        "candidates": candidates,
        "micro_batch": MICRO_BATCH,
        "layers": LAYERS,
        "heads": HEADS,
        "width": 16 if options.tiny else WIDTH,
    }
    notes = {
        "each": "seconds of one pass per candidate: the median of a few passes x the number of candidates",
        "ours": "includes reading the history; `kept` does not, because its cache exists",
        "memory": "peak bytes of the tensors that a call allocates, without its inputs",
    }
    shares = {name: {"ours": encoder.pop("matmul_share")} for name, encoder in encoders.items()}
    found = {"ratios": ratios, "shapes": shapes, "notes": notes, "encoders": encoders}
    return report("candidates", options, found | {"matmul_peak": peak, "matmul_share": shares})


if __name__ == "__main__":
    keep_large_buffers()
    main()
