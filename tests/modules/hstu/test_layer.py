"""HSTU against a loop over rows and keys written from the equations, one user at a time, in double precision."""

import math
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hllm_torchrec.modules.encoders.base import Queries, pack_rows
from hllm_torchrec.modules.encoders.shapes import HSTUShape
from hllm_torchrec.modules.history_cache import check_encoder
from hllm_torchrec.modules.hstu import attention, blocks, eager
from hllm_torchrec.modules.hstu.layer import HSTU, HSTULayer, resolve_preset
from hllm_torchrec.modules.hstu.layout import time_bucket

RESEARCH = HSTUShape(width=6, layers=2, heads=2, qk_width=2, value_width=4, max_positions=12, divide_by=10)
RANKING = replace(RESEARCH, preset="ranking")
VARIANTS = {
    "research": RESEARCH,
    "ranking": RANKING,
    "own length": replace(RESEARCH, divide_by="length"),
    "window": replace(RESEARCH, window=3, divide_by="length"),
    "prefix": replace(RESEARCH, prefix=2, divide_by="length"),
    "prefix and window": replace(RANKING, prefix=2, window=2, divide_by="length"),
    "next event's time": replace(RESEARCH, time_of="next"),
    "bias table shorter than the history": replace(RANKING, relative_bias=True, max_positions=3),
    "normalized outputs beside": replace(RESEARCH, output="concat_norm"),
    "group norm and alpha": replace(RANKING, group_norm=True, alpha=0.7),
    "group norm without weights": replace(RESEARCH, group_norm=True, alpha=1.3),
}
PUBLIC_MASKS = {
    "public prefix": replace(RESEARCH, prefix=2, prefix_mask="history", divide_by="length"),
    "public prefix and window": replace(RANKING, prefix=2, window=2, prefix_mask="history", relative_bias=True),
    "public prefix and window, own length": replace(
        RANKING, prefix=3, window=3, prefix_mask="history", divide_by="length"
    ),
}
LENGTHS = [4, 0, 7, 1, 1]
VISIBLE: list[list[int]] = [[4, 1, 1], [0], [3, 7], [0, 1], []]


def build(shape: HSTUShape) -> HSTU:
    torch.manual_seed(0)
    model = HSTU(shape).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # at their initial size scores are about 0, and hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor, Queries, Tensor]:
    """x [T, D], offsets, times, queries, next times: users of 4, 0, 7, 1 and 1 events."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(LENGTHS), 6, generator=generator, dtype=torch.float64)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    times = torch.randint(0, 5000, (sum(LENGTHS),), generator=generator)
    for start, end in zip(offsets, offsets[1:]):
        times[start:end] = times[start:end].sort().values
    number = [len(v) for v in VISIBLE]
    queries = Queries(
        torch.randn(sum(number), 6, generator=generator, dtype=torch.float64),
        torch.tensor([0, *number]).cumsum(0),
        torch.tensor([v for row in VISIBLE for v in row]),
        torch.randint(5000, 900_000, (sum(number),), generator=generator),
    )
    following = torch.cat([times[1:], times[-1:]]) + 7
    return x, offsets, times, queries, following


def at_the_end(queries: Queries) -> Queries:
    """The queries after the whole history of their users."""
    return replace(queries, visible=torch.tensor(LENGTHS).repeat_interleave(queries.offsets.diff()))


def naive_layer(
    layer: HSTULayer, shape: HSTUShape, x: Tensor, place: list[int], history: int, ask: Tensor, now: Tensor
) -> Tensor:
    """Eq. 1-3 for the rows of one user: `history` positions, and perhaps a query at place[-1]."""
    shape, rows = resolve_preset(shape), []
    assert shape.qk_width and shape.value_width and shape.affine_norm is not None
    u, v, q, k = layer.project(x)  # checked by test_the_presets_are_the_published_parameterisations
    for i in range(len(place)):
        keys = [j for j in range(len(place)) if sees(shape, place, i, j, history)]
        out = []
        for h in range(shape.heads):
            total = torch.zeros(shape.value_width, dtype=x.dtype)
            for j in keys:
                score = torch.dot(q[i, h], k[j, h])
                if shape.alpha is not None:
                    score = score * shape.alpha
                elif shape.scaled_scores:
                    score = score / math.sqrt(shape.qk_width)
                if layer.bias is not None:
                    apart = place[i] - place[j]
                    if shape.prefix_mask == "history":
                        apart = public_id(shape, place, i, history) - public_id(shape, place, j, history)
                    apart = min(max(apart, 0), shape.max_positions - 1)
                    seconds = abs(int(ask[i]) - int(now[j])) if i != j or i < history else 0
                    bucket = min(math.floor(math.log(max(seconds, 1)) / 0.301), shape.time_buckets)
                    score = score + layer.bias.of_position[apart] + layer.bias.of_time[bucket]
                total = total + score * torch.sigmoid(score) * v[j, h]
            out.append(total / (len(keys) if shape.divide_by == "length" else shape.divide_by))
        rows.append(torch.cat(out))
    a = torch.stack(rows)
    groups = a.view(len(rows), shape.heads if shape.group_norm else 1, -1)
    norm = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    if shape.affine_norm:
        per_group = (-1, 1) if shape.group_norm else (1, -1)
        norm = norm * layer.attention_norm.weight.view(per_group) + layer.attention_norm.bias.view(per_group)
    norm = norm.flatten(1)
    y = u * norm
    joined = {"gated": [y], "concat": [u, a, y], "concat_norm": [u, norm, y]}[str(shape.output)]
    return x + layer.out(torch.cat(joined, -1))


def public_id(shape: HSTUShape, place: list[int], i: int, history: int) -> int:
    """Position in the public code: the context counts as one; a target stands behind all history."""
    return max(place[i] - shape.prefix + 1, 0 if i < history else 1)


def sees(shape: HSTUShape, place: list[int], i: int, j: int, history: int) -> bool:
    if i == j:
        return True
    if j >= history:
        return False
    if shape.prefix_mask == "history":
        row, column = public_id(shape, place, i, history), public_id(shape, place, j, history)
        return row == 0 or 0 < row - column < (shape.window or 10**9)
    if place[i] < shape.prefix and i < history:
        return place[j] < shape.prefix
    if place[j] >= place[i]:
        return False
    return place[j] < shape.prefix or shape.window is None or place[i] - place[j] < shape.window


def naive(model: HSTU, x: Tensor, offsets: Tensor, times: Tensor, queries: Queries, following: Tensor):
    """Each user alone; each query alone after the user's whole history."""

    def run(rows: Tensor, place: list[int], history: int, ask: Tensor, now: Tensor) -> Tensor:
        if model.positions is not None:
            rows = rows + model.positions.weight[torch.tensor(place, dtype=torch.int64)]
        for layer in model.layers:
            assert isinstance(layer, HSTULayer)
            rows = naive_layer(layer, model.shape, rows, place, history, ask, now)
        return rows

    h, q = [], []
    asked = following if model.query_next_time else times
    for user, (start, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        places = list(range(end - start))
        now, ask = times[start:end], asked[start:end]
        if places:
            h.append(run(x[start:end], places, len(places), ask, now))
        for number in range(int(queries.offsets[user]), int(queries.offsets[user + 1])):
            visible, time = int(queries.visible[number]), queries.times[number : number + 1]
            rows = torch.cat([x[start:end], queries.x_QD[number : number + 1]])
            row = run(rows, [*places, visible], len(places), torch.cat([ask, time]), torch.cat([now, time]))
            q.append(row[-1])
    return torch.cat(h), torch.stack(q)


@pytest.mark.parametrize("name", [*VARIANTS, *PUBLIC_MASKS])
def test_values_and_gradients_equal_a_loop_written_from_the_equations(name: str) -> None:
    model = build((VARIANTS | PUBLIC_MASKS)[name])
    x, offsets, times, queries, following = batch()
    if name in PUBLIC_MASKS:
        queries = at_the_end(queries)
    x.requires_grad_()
    queries.x_QD.requires_grad_()
    inputs = [x, queries.x_QD, *model.parameters()]
    gradients, values = [], []
    for h, q in (model(x, offsets, times, queries, following), naive(model, x, offsets, times, queries, following)):
        generator = torch.Generator().manual_seed(2)
        loss = sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in (h, q))
        values.append((h, q))
        gradients.append(torch.autograd.grad(loss, inputs, materialize_grads=True))  # type: ignore[arg-type]
    torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-8)
    touched = [name for (name, p), g in zip(model.named_parameters(), gradients[0][2:]) if bool(g.any())]
    assert len(touched) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["research", "ranking"])
def test_the_presets_are_the_published_parameterisations(name: str) -> None:
    layer = build(VARIANTS[name]).layers[0]
    assert isinstance(layer, HSTULayer)
    x = torch.randn(5, 6, dtype=torch.float64)
    norm = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    if name == "ranking":
        norm = norm * layer.norm.weight + layer.norm.bias
    projected = norm @ layer.uvqk.weight.T + (layer.uvqk.bias if name == "ranking" else 0)
    silu = projected * torch.sigmoid(projected)
    if name == "ranking":
        silu = torch.cat([silu[:, :8], projected[:, 8:]], dim=-1)
    u, v, q, k = layer.project(x)
    torch.testing.assert_close(torch.cat([y.reshape(5, -1) for y in (u, v, q, k)], -1), silu)
    assert (layer.out.bias is None) == (name == "ranking") and (layer.bias is None) == (name == "ranking")
    assert layer.out.in_features == (24 if name == "ranking" else 8)


@pytest.mark.parametrize("name", ["research", "window", "ranking", "next event's time"])
def test_nothing_of_a_later_position_reaches_an_earlier_one(name: str) -> None:
    model = build(VARIANTS[name])
    x, offsets, times, queries, following = batch()
    before, queries_before = model(x, offsets, times, queries, following)
    changed, later = x.clone(), times.clone()
    changed[8] += 1.0  # the third user's position 4, rows 4 to 10
    later[8] += 100_000
    after, queries_after = model(changed, offsets, later, queries, following)
    differs = ((after - before).abs().amax(-1) > 1e-12).nonzero().flatten().tolist()
    assert differs and set(differs) <= {8, 9, 10} and 8 in differs
    asked = ((queries_after - queries_before).abs().amax(-1) > 1e-12).nonzero().flatten().tolist()
    assert set(asked) <= {5}, "only the query that sees 7 positions"


def test_queries_do_not_see_one_another_and_history_does_not_see_them() -> None:
    model = build(RESEARCH)
    x, offsets, times, queries, _ = batch()
    h, q = model(x, offsets, times, queries)
    other = queries.x_QD.clone()
    other[1] += 1.0
    h_after, q_after = model(x, offsets, times, replace(queries, x_QD=other))
    assert torch.equal(h, h_after)
    changed = ((q_after - q).abs().amax(-1) > 0).nonzero().flatten().tolist()
    assert changed == [1]


def test_a_query_inside_a_history_that_the_context_sees_is_refused() -> None:
    model = build(PUBLIC_MASKS["public prefix"])
    x, offsets, times, queries, _ = batch()
    with pytest.raises(ValueError, match="^prefix_mask: 'history': a query inside a history would see the events"):
        model(x, offsets, times, queries)
    with pytest.raises(ValueError, match="^prefix_mask: 'history': a cached history would change"):
        check_encoder(model)


@pytest.mark.parametrize("divide_by", [10, "length"])
def test_who_shares_the_batch_changes_nothing(divide_by: int | str) -> None:
    model = build(replace(RESEARCH, divide_by=divide_by))  # type: ignore[arg-type]
    x, offsets, times, _, _ = batch()
    together = model(x, offsets, times)[0]
    alone = [
        model(x[a:b], torch.tensor([0, b - a]), times[a:b])[0] for a, b in zip(offsets.tolist(), offsets.tolist()[1:])
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_no_rows_run_the_layers_and_keep_a_graph_to_every_weight() -> None:
    model = build(RESEARCH)
    x = torch.empty(0, 6, dtype=torch.float64, requires_grad=True)
    h, q = model(x, torch.zeros(1, dtype=torch.int64))
    assert h.shape == q.shape == (0, 6)
    (h.sum() * 0).backward()
    assert all(p.grad is not None for p in model.parameters()) and x.grad is not None


def test_time_buckets_are_those_of_the_published_formula() -> None:
    seconds = torch.tensor([0, 1, -1, 2, 86_400, -86_400, 10**12, 10**18])
    expected = [min(int(math.log(max(abs(s), 1)) / 0.301), 128) for s in seconds.tolist()]
    assert time_bucket(seconds, 128).tolist() == expected
    assert expected[4] == 37 and time_bucket(seconds, 20)[4] == 20


def test_dropout_and_stochastic_depth_act_in_training_alone() -> None:
    x, offsets, times, _, _ = batch()
    for changes in ({"dropout": 0.5}, {"stochastic_depth": 0.9}):
        model = build(replace(RESEARCH, **changes))  # type: ignore[arg-type]
        plain = build(RESEARCH)(x, offsets, times)[0]
        assert torch.equal(model(x, offsets, times)[0], plain)
        model.train()
        assert not torch.equal(model(x, offsets, times)[0], plain)


def test_stochastic_depth_skips_whole_users_and_keeps_the_mean() -> None:
    torch.manual_seed(3)
    model = build(replace(RESEARCH, layers=1, stochastic_depth=0.5)).train()
    layer = model.layers[0]
    assert isinstance(layer, HSTULayer)
    sequences = torch.arange(400).repeat_interleave(2)
    x, u, a = (torch.randn(800, n, dtype=torch.float64) for n in (6, 8, 8))
    with torch.no_grad():
        change = layer.combine(x, u, a, sequences) - x
        layer.eval()
        whole = layer.combine(x, u, a, sequences) - x
    kept = change.abs().sum(-1).view(400, 2) > 0
    assert bool((kept[:, 0] == kept[:, 1]).all()) and 0.4 < kept.double().mean() < 0.6
    torch.testing.assert_close(change[kept.flatten()], 2 * whole[kept.flatten()])


def test_recomputed_layers_have_the_same_gradients() -> None:
    x, offsets, times, queries, _ = batch()
    found = []
    for recompute in (False, True):
        model = build(RESEARCH)
        model.recompute = recompute
        h, q = model(x, offsets, times, queries)
        found.append(torch.autograd.grad(h.square().sum() + q.square().sum(), list(model.parameters())))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.slow
def test_the_compiled_backend_equals_the_eager_one() -> None:
    x, offsets, times, _, _ = batch()
    found = []
    for backend in ("eager", "compiled"):
        model = build(replace(RESEARCH, backend=backend))
        h = model(x, offsets, times)[0]
        found.append((h, *torch.autograd.grad(h.square().sum(), list(model.parameters()))))
    torch.testing.assert_close(found[0], found[1])


def test_chunks_and_what_is_kept_of_them_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, offsets, times, queries, following = batch()
    for name in ("prefix and window", "next event's time", "public prefix and window"):
        shape, found = (VARIANTS | PUBLIC_MASKS)[name], []
        queries = at_the_end(queries) if name in PUBLIC_MASKS else queries
        for most_scores, kept in ((2**20, 2**24), (4, 0), (16, 30)):
            monkeypatch.setattr(blocks, "MOST_SCORES", most_scores)
            monkeypatch.setattr(eager, "CACHED_SCORES", kept)
            monkeypatch.setattr(blocks, "CACHED_CELLS", kept)
            model = build(replace(shape, relative_bias=True))
            h, q = model(x, offsets, times, queries, following)
            loss = h.square().sum() + q.square().sum()
            found.append((h, q, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
        torch.testing.assert_close(found[1:], [found[0]] * 2, rtol=1e-10, atol=1e-10)


def test_many_short_sequences_are_not_padded_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = torch.tensor([90, 60, 40, 30, *[5] * 60])
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    x, times = torch.randn(int(offsets[-1]), 6, dtype=torch.float64), torch.arange(int(offsets[-1])) * 50
    model, found, cells = build(replace(RESEARCH, max_positions=90)), [], []
    for shared in (blocks.SHARED_CELLS, 2**40):
        monkeypatch.setattr(blocks, "SHARED_CELLS", shared)
        plan = blocks.plan_blocks(pack_rows(offsets, int(offsets[-1]), times), model.rules)
        cells.append(sum(b.rows.shape[0] * b.rows.shape[1] ** 2 for b in plan.buckets))
        out = model(x, offsets, times)[0]
        found.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
    assert cells[0] < cells[1] / 4


def test_memory_does_not_grow_with_the_square_of_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ((blocks, "MOST_SCORES"), (blocks, "CACHED_CELLS"), (eager, "CACHED_SCORES"))
    for module, name in limits:
        monkeypatch.setattr(module, name, 2**13)
    model, used = build(replace(RESEARCH, heads=1, max_positions=800)), []
    for length in (200, 800):
        x, times = torch.randn(length, 6, dtype=torch.float64), torch.arange(length) * 50
        with torch.profiler.profile(profile_memory=True) as found:
            model(x.requires_grad_(), torch.tensor([0, length]), times)[0].sum().backward()
        events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = accumulate(e.nbytes() for e in sorted(events, key=lambda event: event.start_ns()))
        used.append(max(sizes))
    assert used[1] < 6 * used[0] and used[1] < 800 * 800 * 8 / 2


def test_a_backend_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    x, offsets, times, _, _ = batch()
    monkeypatch.setitem(
        attention.HSTU_BACKENDS,
        "tpu",
        attention.HSTUBackend(eager.blockwise, lambda device: "it needs a TPU"),
    )
    with pytest.raises(ValueError, match="'tpu': cannot run on cpu: it needs a TPU; choose 'eager'"):
        build(replace(RESEARCH, backend="tpu"))(x, offsets, times)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        build(replace(RESEARCH, backend="compiled"))(x, offsets, times)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backend": "flash"},
            r"^backend: 'flash': no such attention backend; there are \['auto', 'compiled",
        ),
        ({"preset": "meta"}, "^preset: 'meta': must be one of research, ranking"),
        ({"heads": 4, "qk_width": None}, "^heads: 4: does not divide the width 6"),
        ({"divide_by": 0}, "^divide_by: 0: must be 'length' or an integer of at least 1"),
        ({"window": 0}, "^window: 0: must be at least 1"),
        ({"time_buckets": 5000}, "^time_buckets: 5000: must be 0 to 1024"),
        ({"alpha": 0.0}, "^alpha: 0.0: must be a number above 0"),
        ({"alpha": math.nan}, "^alpha: nan: must be a number above 0"),
        ({"prefix_mask": "history"}, "^prefix_mask: 'history': needs context positions"),
        ({"prefix_mask": "history", "prefix": 1, "backend": "triton"}, "^prefix_mask: 'history': the backend 'triton'"),
    ],
)
def test_a_wrong_shape_is_an_error(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HSTU(replace(RESEARCH, **changes))


def test_what_the_encoder_needs_and_does_not_get_is_an_error() -> None:
    x, offsets, times, _, _ = batch()
    with pytest.raises(ValueError, match="next_times is None"):
        build(replace(RESEARCH, time_of="next"))(x, offsets, times)
    with pytest.raises(ValueError, match="^max_positions: 5: a row stands at position 6"):
        build(replace(RESEARCH, max_positions=5))(x, offsets, times)


def test_operations_are_those_of_the_matrix_products() -> None:
    model = build(RANKING)
    projections = 2 * 6 * (2 * 8 + 2 * 4) + 2 * 24 * 6
    assert model.flops(5, 15) == 2 * (5 * projections + 15 * 2 * 2 * (2 + 4))
