"""Triton kernels of HSTU's pointwise attention over packed sequences: forward, and backward by rows, keys and biases.

    s_ij  = alpha q_i . k_j + rab_ij          rab_ij = of_position[min(i - j, P - 1)] + of_time[bucket(t_i - t_j)]
    a_i   = sum_j silu(s_ij) v_j / n_i
    ds_ij = (da_i . v_j / n_i) silu'(s_ij)                        silu'(s) = g (1 + s (1 - g)),  g = sigmoid(s)
    dq_i  = alpha sum_j ds_ij k_j;   dk_j = alpha sum_i ds_ij q_i;   dv_j = sum_i silu(s_ij) / n_i da_i
    dof_position[d], dof_time[b] = sums of ds over heads and over the pairs at distance d, in bucket b

One program computes a tile of one sequence: it loops over the tiles that this tile can see and skips the others:

          keys j ->                              forward, rows, biases: a program is a band of rows m and goes
        +---+---+---+---+                        through its key tiles, left to right;
    m   | x |   |   |   |   x computed           keys: a program is a column of keys n and goes down its rows,
    |   +---+---+---+---+   . skipped: future    then through the queries of its sequence.
    v   | x | x |   | . |   w skipped: outside   Scores and biases live in registers: in memory nothing is N x N.
        +---+---+---+---+     the window         With a context prefix its key tiles come first, then those of
        | w | x | x |   |                        the window.
        +---+---+---+---+

Rows of all sequences are packed one after the other (no padding in memory). Tile t belongs to the sequence s with
offsets[s] // BLOCK + s <= t < offsets[s + 1] // BLOCK + s + 1: every sequence gets at least as many tiles as it needs,
so the size of the grid follows from the number of rows alone, without a device-to-host copy.

All sums are in float32. `forward`, `backward_rows` and `backward_keys` write each result once, and the gradient of the
time table is summed in a fixed order, so these are reproducible bit for bit. The gradient of the position table is
summed with atomics over many programs, and may differ in its last bits from run to run.

Attending rows are history positions (HISTORY) or queries, which start at row `ask_base`; keys are history. The
contribution of a query's own key is added outside (`triton_backend.attend`).

Names: place [M] is a row's position in its sequence, column [N] a key's; inside [M] and there [N] say which of a tile's
rows and keys exist. Legend: T history positions, P rows of the position table, M rows, N keys, H heads, D and V padded
widths of a head's keys and values.
"""

# Kernels' arguments have Triton's own types:
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl
from triton import jit

INVERSE_BUCKET_WIDTH = tl.constexpr(1 / 0.301)
TILES_ON_A_CPU = {"BLOCK_M": 16, "BLOCK_N": 16}


def _tuned(*shapes: tuple[int, int, int, int]) -> list[triton.Config]:
    """Make configurations (BLOCK_M, BLOCK_N, warps, stages) for the autotuner; the interpreter gets one small tile."""
    if triton.knobs.runtime.interpret:
        return [triton.Config(TILES_ON_A_CPU)]
    return [triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=w, num_stages=s) for m, n, w, s in shapes]


TUNED_FOR = ["D", "V", "HAS_BIAS", "HISTORY", "WINDOW"]
"""Arguments for whose values tiles are tuned. Lengths are not among them, or every batch would be tuned for."""


@jit
def _find_tile(offsets, sequences, tile, BLOCK: tl.constexpr):
    """Find a tile's sequence by bisection: (sequence, its first row, its length, the tile's number within it)."""
    # The first tile of sequence s is offsets[s] // BLOCK + s; the result is the last s that begins at or before `tile`.
    low, high = 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        reached = tl.load(offsets + middle) // BLOCK + middle <= tile
        low, high = tl.where(reached, middle, low), tl.where(reached, high, middle)
    start = tl.load(offsets + low)
    length = (tl.load(offsets + low + 1) - start).to(tl.int32)
    return low, start, length, (tile - (start // BLOCK + low)).to(tl.int32)


@jit
def _load(base, row, row_stride, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Load rows [n] of one head: [n, PADDED], zeros for rows outside and columns beyond WIDTH."""
    column = tl.arange(0, PADDED)
    return tl.load(
        base + row[:, None] * row_stride + column[None, :], mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0
    )


@jit
def _store(base, row, row_stride, inside, values, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Store values [n, PADDED] to rows [n] of one head, without the padding."""
    column = tl.arange(0, PADDED)
    tl.store(
        base + row[:, None] * row_stride + column[None, :],
        values.to(base.dtype.element_ty),
        mask=inside[:, None] & (column < WIDTH)[None, :],
    )


@jit
def _sees(place, inside, column, length, HISTORY: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr):
    """Mask [M, N], True where the row at `place` [M] sees the key at `column` [N] of a sequence of `length`."""
    place, column = place[:, None], column[None, :]
    # A history row sees its own column; a query at place p sees the p events before it.
    shown = column <= place if HISTORY else column < place
    if WINDOW > 0:
        shown = shown & ((place - column < WINDOW) | (column < PREFIX))
    if PREFIX > 0 and HISTORY:
        shown = shown | ((place < PREFIX) & (column < PREFIX))
    return shown & inside[:, None] & (column < length)


@jit
def _distance(place, column, LAST_POSITION: tl.constexpr):
    """Index [M, N] into the position table. Negative distances are masked; 0 keeps the load in bounds."""
    return tl.minimum(tl.maximum(place[:, None] - column[None, :], 0), LAST_POSITION)


@jit
def _bucket(asked, time, edges, LAST_BUCKET: tl.constexpr):
    """Index [M, N] into the time table: floor(ln(max(|asked - time|, 1)) / 0.301), exactly.

    The float32 logarithm, raised by more than its error, gives the right bucket or one too high; `edges`
    [LAST_BUCKET + 1] int64, the first second of each bucket, decides.
    """
    seconds = tl.maximum(tl.abs(asked[:, None] - time[None, :]), 1)
    guess = (tl.log(seconds.to(tl.float32)) * INVERSE_BUCKET_WIDTH + 1e-3).to(tl.int32)
    guess = tl.minimum(guess, LAST_BUCKET)
    return tl.where(seconds < tl.load(edges + guess), guess - 1, guess)


@jit
def _scores(
    q, k, place, column, asked, time, of_position, of_time, edges, alpha,
    HAS_BIAS: tl.constexpr, LAST_POSITION: tl.constexpr, LAST_BUCKET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the scores s [M, N] of q [M, D] and k [N, D]."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * alpha
    if HAS_BIAS:
        distance = _distance(place, column, LAST_POSITION)
        bucket = _bucket(asked, time, edges, LAST_BUCKET)
        scores += tl.load(of_position + distance).to(tl.float32) + tl.load(of_time + bucket).to(tl.float32)
    return scores


@jit
def _received(grad, grad_row, divisor, row, inside, VALUE_WIDTH: tl.constexpr, V: tl.constexpr):
    """Load da / n [M, V] of one head, in the type of da."""
    rows = _load(grad, row, grad_row, inside, VALUE_WIDTH, V)
    return (rows / tl.load(divisor + row, mask=inside, other=1.0)[:, None]).to(rows.dtype)


@jit
def _score_gradients(s, shown, grad, v, PRECISION: tl.constexpr):
    """Compute ds [M, N]; grad [M, V] is da / n."""
    gate = tl.sigmoid(s)
    of_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    return tl.where(shown, of_weights * gate * (1.0 + s * (1.0 - gate)), 0.0)


@jit
def _key_tiles(
    place, inside, length, HISTORY: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Find the key tiles that rows at `place` [M] see, as (context, low, number).

    There are `number` of them: the first `context` tiles of the sequence, and the rest from tile `low` on.
    """
    # `end` is one past the last key that any row of the band sees; rows that do not exist must not widen the range.
    end = tl.max(tl.where(inside, place, -1), 0)
    lowest = tl.min(tl.where(inside, place, length), 0)
    if HISTORY:
        end += 1
        # A context row sees later context rows, too.
        if PREFIX > 0:
            end = tl.where(lowest < PREFIX, tl.maximum(end, PREFIX), end)
    tiles = tl.cdiv(tl.maximum(tl.minimum(end, length), 0), BLOCK_N)
    if WINDOW > 0:
        context = tl.minimum((PREFIX + BLOCK_N - 1) // BLOCK_N, tiles)
        # Not before `context`: the loop must not visit a tile twice.
        low = tl.maximum(tl.maximum(lowest - WINDOW + 1, 0) // BLOCK_N, context)
        return context, low, context + tl.maximum(tiles - low, 0)
    # Without a window all tiles count as context: one loop serves both cases.
    return tiles, tiles, tiles


@jit
def _band(ask_offsets, key_offsets, positions, sequences, ask_base, BLOCK_M: tl.constexpr):
    """Find the rows of this program: (any rows, packed rows [M], places [M], inside [M], first key, number of keys).

    Bands of a sequence run from last to first: the last sees the most keys, and long programs should start early.
    """
    sequence, start, count, number = _find_tile(ask_offsets, sequences, tl.program_id(0), BLOCK_M)
    key_start = tl.load(key_offsets + sequence)
    length = (tl.load(key_offsets + sequence + 1) - key_start).to(tl.int32)
    bands = tl.cdiv(count, BLOCK_M)
    within = (bands - 1 - number) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (within >= 0) & (within < count)
    row = ask_base + start + within
    place = tl.load(positions + row, mask=inside, other=0).to(tl.int32)
    # The grid has up to one tile per sequence more than needed: such a program has no rows.
    return number < bands, row, place, inside, key_start, length


@triton.autotune(_tuned((64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 32, 4, 3)), TUNED_FOR)
@jit
def forward(
    q, k, v, out, q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head,
    ask_offsets, key_offsets, positions, asked_at, times, divisor, edges, of_position, of_time,
    sequences, ask_base, alpha,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    HAS_BIAS: tl.constexpr, LAST_POSITION: tl.constexpr, LAST_BUCKET: tl.constexpr, HISTORY: tl.constexpr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute out [rows, H, V] of a band of BLOCK_M rows and one head. Grid: (bands, heads)."""
    head = tl.program_id(1)
    exists, row, place, inside, key_start, length = _band(
        ask_offsets, key_offsets, positions, sequences, ask_base, BLOCK_M
    )
    if exists:
        asked = tl.load(asked_at + row, mask=inside, other=0)
        asking = _load(q + head * q_head, row, q_row, inside, WIDTH, D)
        total = tl.zeros([BLOCK_M, V], tl.float32)
        context, low, number = _key_tiles(place, inside, length, HISTORY, WINDOW, PREFIX, BLOCK_N)
        for step in range(number):
            tile = tl.where(step < context, step, low + step - context)
            column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            key, there = key_start + column, column < length
            keys = _load(k + head * k_head, key, k_row, there, WIDTH, D)
            values = _load(v + head * v_head, key, v_row, there, VALUE_WIDTH, V)
            time = tl.load(times + key, mask=there, other=0)
            scores = _scores(
                asking, keys, place, column, asked, time, of_position, of_time, edges, alpha,
                HAS_BIAS, LAST_POSITION, LAST_BUCKET, PRECISION,
            )  # fmt: skip
            shown = _sees(place, inside, column, length, HISTORY, WINDOW, PREFIX)
            weights = tl.where(shown, scores * tl.sigmoid(scores), 0.0)
            # tl.dot needs both sides in one type; its sum stays in float32.
            total += tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        total = total / tl.load(divisor + row, mask=inside, other=1.0)[:, None]
        _store(out + head * out_head, row, out_row, inside, total, VALUE_WIDTH, V)


@triton.autotune(_tuned((64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 3)), TUNED_FOR)
@jit
def backward_rows(
    q, k, v, grad, dq, q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head, dq_row, dq_head,
    ask_offsets, key_offsets, positions, asked_at, times, divisor, edges, of_position, of_time,
    sequences, ask_base, alpha,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    HAS_BIAS: tl.constexpr, LAST_POSITION: tl.constexpr, LAST_BUCKET: tl.constexpr, HISTORY: tl.constexpr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute dq [rows, H, D] of a band of BLOCK_M rows and one head. Grid: (bands, heads)."""
    head = tl.program_id(1)
    exists, row, place, inside, key_start, length = _band(
        ask_offsets, key_offsets, positions, sequences, ask_base, BLOCK_M
    )
    if exists:
        asked = tl.load(asked_at + row, mask=inside, other=0)
        asking = _load(q + head * q_head, row, q_row, inside, WIDTH, D)
        received = _received(grad + head * grad_head, grad_row, divisor, row, inside, VALUE_WIDTH, V)
        total = tl.zeros([BLOCK_M, D], tl.float32)
        context, low, number = _key_tiles(place, inside, length, HISTORY, WINDOW, PREFIX, BLOCK_N)
        for step in range(number):
            tile = tl.where(step < context, step, low + step - context)
            column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            key, there = key_start + column, column < length
            keys = _load(k + head * k_head, key, k_row, there, WIDTH, D)
            values = _load(v + head * v_head, key, v_row, there, VALUE_WIDTH, V)
            time = tl.load(times + key, mask=there, other=0)
            scores = _scores(
                asking, keys, place, column, asked, time, of_position, of_time, edges, alpha,
                HAS_BIAS, LAST_POSITION, LAST_BUCKET, PRECISION,
            )  # fmt: skip
            shown = _sees(place, inside, column, length, HISTORY, WINDOW, PREFIX)
            gradient = _score_gradients(scores, shown, received, values, PRECISION)
            total += tl.dot(gradient.to(keys.dtype), keys, input_precision=PRECISION)
        _store(dq + head * dq_head, row, dq_row, inside, total * alpha, WIDTH, D)


@triton.autotune(_tuned((64, 64, 8, 2), (32, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)), TUNED_FOR)
@jit
def backward_keys(
    q, k, v, grad, dk, dv, q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head, dk_row, dk_head,
    dv_row, dv_head, query_offsets,
    ask_offsets, key_offsets, positions, asked_at, times, divisor, edges, of_position, of_time,
    sequences, ask_base, alpha,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    HAS_BIAS: tl.constexpr, LAST_POSITION: tl.constexpr, LAST_BUCKET: tl.constexpr, HISTORY: tl.constexpr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_QUERIES: tl.constexpr,
):  # fmt: skip
    """Compute dk [T, H, D] and dv [T, H, V] of BLOCK_N keys and one head. Grid: (tiles of keys, heads)."""
    head = tl.program_id(1)
    sequence, key_start, length, tile = _find_tile(key_offsets, sequences, tl.program_id(0), BLOCK_N)
    first = tile * BLOCK_N
    if first < length:
        column = first + tl.arange(0, BLOCK_N)
        key, there = key_start + column, column < length
        keys = _load(k + head * k_head, key, k_row, there, WIDTH, D)
        values = _load(v + head * v_head, key, v_row, there, VALUE_WIDTH, V)
        time = tl.load(times + key, mask=there, other=0)
        of_keys, of_values = tl.zeros([BLOCK_N, D], tl.float32), tl.zeros([BLOCK_N, V], tl.float32)
        # The mirror of `_key_tiles`: history rows that can see some key of this tile. Those are the rows from the tile
        # on, up to the window behind its last key; a tile with context keys is seen by all rows.
        seen_from, seen_to = first, length
        if WINDOW > 0:
            seen_to = tl.where(first < PREFIX, length, tl.minimum(length, first + BLOCK_N - 1 + WINDOW))
        if PREFIX > 0:
            seen_from = tl.where(first < PREFIX, 0, first)
        of_keys, of_values = _add_rows(
            of_keys, of_values, keys, values, column, time, length, seen_from, seen_to, key_start,
            q + head * q_head, grad + head * grad_head, q_row, grad_row, positions, asked_at, divisor, edges,
            of_position, of_time, alpha, WIDTH, VALUE_WIDTH, D, V, HAS_BIAS, LAST_POSITION, LAST_BUCKET, True,
            WINDOW, PREFIX, PRECISION, BLOCK_M,
        )  # fmt: skip
        if HAS_QUERIES:
            # Queries of a sequence are in no order of position: all are visited, and `_add_rows` skips tiles that see
            # nothing.
            asks_from = tl.load(query_offsets + sequence)
            asks = (tl.load(query_offsets + sequence + 1) - asks_from).to(tl.int32)
            of_keys, of_values = _add_rows(
                of_keys, of_values, keys, values, column, time, length, 0, asks, ask_base + asks_from,
                q + head * q_head, grad + head * grad_head, q_row, grad_row, positions, asked_at, divisor, edges,
                of_position, of_time, alpha, WIDTH, VALUE_WIDTH, D, V, HAS_BIAS, LAST_POSITION, LAST_BUCKET, False,
                WINDOW, PREFIX, PRECISION, BLOCK_M,
            )  # fmt: skip
        _store(dk + head * dk_head, key, dk_row, there, of_keys * alpha, WIDTH, D)
        _store(dv + head * dv_head, key, dv_row, there, of_values, VALUE_WIDTH, V)


@jit
def _add_rows(
    of_keys, of_values, keys, values, column, time, length, first, end, start,
    q, grad, q_row, grad_row, positions, asked_at, divisor, edges, of_position, of_time, alpha,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    HAS_BIAS: tl.constexpr, LAST_POSITION: tl.constexpr, LAST_BUCKET: tl.constexpr, HISTORY: tl.constexpr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add the contributions of rows start + [first, end) to dk / alpha and dv of a tile of keys, and return both."""
    for begin in range(first, end, BLOCK_M):
        within = begin + tl.arange(0, BLOCK_M)
        inside = within < end
        row = start + within
        place = tl.load(positions + row, mask=inside, other=0).to(tl.int32)
        # Queries are not sorted by position: skip a tile of them if even the latest is before all of these keys.
        if (tl.max(place, 0) > tl.min(column, 0)) | HISTORY:
            asked = tl.load(asked_at + row, mask=inside, other=0)
            asking = _load(q, row, q_row, inside, WIDTH, D)
            received = _received(grad, grad_row, divisor, row, inside, VALUE_WIDTH, V)
            scores = _scores(
                asking, keys, place, column, asked, time, of_position, of_time, edges, alpha,
                HAS_BIAS, LAST_POSITION, LAST_BUCKET, PRECISION,
            )  # fmt: skip
            shown = _sees(place, inside, column, length, HISTORY, WINDOW, PREFIX)
            # `received` is divided by n_i already, so the weights here are not.
            weights = tl.where(shown, scores * tl.sigmoid(scores), 0.0).to(received.dtype)
            of_values += tl.dot(tl.trans(weights), received, input_precision=PRECISION)
            gradient = _score_gradients(scores, shown, received, values, PRECISION).to(asking.dtype)
            of_keys += tl.dot(tl.trans(gradient), asking, input_precision=PRECISION)
    return of_keys, of_values


# Tuning runs the kernel several times: without the reset every run would add to the sums of the one before.
@triton.autotune(
    _tuned((64, 32, 4, 2), (64, 64, 8, 2), (64, 64, 4, 2)), TUNED_FOR, reset_to_zero=["position_parts", "time_parts"]
)
@jit
def backward_biases(
    q, k, v, grad, position_parts, time_parts, q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head,
    ask_offsets, key_offsets, positions, asked_at, times, divisor, edges, of_position, of_time,
    sequences, ask_base, alpha,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    HAS_BIAS: tl.constexpr, LAST_POSITION: tl.constexpr, LAST_BUCKET: tl.constexpr, HISTORY: tl.constexpr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr, COPIES: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of both bias tables from a band of BLOCK_M rows. Grid: (bands,).

    The heads share the tables, so a program sums over heads first: one atomic addition per pair, not one per head.
    position_parts [COPIES, LAST_POSITION + 1]: partial sums, so that fewer programs collide at one address.
    time_parts [bands, BUCKETS]: one row per program. Both float32 and zero before the launch.
    """
    exists, row, place, inside, key_start, length = _band(
        ask_offsets, key_offsets, positions, sequences, ask_base, BLOCK_M
    )
    if exists:
        asked = tl.load(asked_at + row, mask=inside, other=0)
        nearest_row = tl.min(tl.where(inside, place, length), 0)
        position_part = position_parts + (tl.program_id(0) % COPIES) * (LAST_POSITION + 1)
        by_bucket, numbers, beyond = tl.zeros([BUCKETS], tl.float32), tl.arange(0, BUCKETS), 0.0
        context, low, number = _key_tiles(place, inside, length, HISTORY, WINDOW, PREFIX, BLOCK_N)
        for step in range(number):
            tile = tl.where(step < context, step, low + step - context)
            column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            key, there = key_start + column, column < length
            time = tl.load(times + key, mask=there, other=0)
            shown = _sees(place, inside, column, length, HISTORY, WINDOW, PREFIX)
            distance = _distance(place, column, LAST_POSITION)
            bucket = _bucket(asked, time, edges, LAST_BUCKET)
            added = tl.load(of_position + distance).to(tl.float32) + tl.load(of_time + bucket).to(tl.float32)
            gradient = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for head in range(HEADS):
                asking = _load(q + head * q_head, row, q_row, inside, WIDTH, D)
                received = _received(grad + head * grad_head, grad_row, divisor, row, inside, VALUE_WIDTH, V)
                keys = _load(k + head * k_head, key, k_row, there, WIDTH, D)
                values = _load(v + head * v_head, key, v_row, there, VALUE_WIDTH, V)
                scores = tl.dot(asking, tl.trans(keys), input_precision=PRECISION) * alpha + added
                gradient += _score_gradients(scores, shown, received, values, PRECISION)
            # Time buckets have no atomics: the tile's gradient is reduced bucket by bucket, over the buckets that occur
            # in it.
            lowest = tl.min(tl.min(tl.where(shown, bucket, LAST_BUCKET), 1), 0)
            highest = tl.max(tl.max(tl.where(shown, bucket, 0), 1), 0)
            for one in range(lowest, highest + 1):  # away from the diagonal a tile spans one or two buckets
                of_bucket = tl.sum(tl.sum(tl.where(bucket == one, gradient, 0.0), 1), 0)
                by_bucket += tl.where(numbers == one, of_bucket, 0.0)
            # The nearest pair of the tile is already beyond the table: all pairs share its last row, so one sum will do
            # instead of BLOCK_M x BLOCK_N atomics on one address.
            if nearest_row - (tile + 1) * BLOCK_N + 1 >= LAST_POSITION:
                beyond += tl.sum(tl.sum(gradient, 1), 0)
            else:
                tl.atomic_add(position_part + distance, gradient, mask=shown, sem="relaxed")
        tl.atomic_add(position_part + LAST_POSITION, beyond, sem="relaxed")
        tl.store(time_parts + tl.program_id(0) * BUCKETS + numbers, by_bucket)


SMALLEST_BAND = min(config.kwargs["BLOCK_M"] for config in backward_biases.configs)
"""Smallest band of `backward_biases` that the autotuner may choose: bounds the number of rows of time_parts."""
