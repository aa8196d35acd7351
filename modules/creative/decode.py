"""Decoding of responses for (user, item) pairs. Keys and values of the tokens before {user} are computed once per item.

The decoding loop is our own, because `generate` of transformers silently returns wrong tokens if it gets
`inputs_embeds` and the cache of a prefix (issues 35707 and 36151 of transformers).

Legend: I items, B users, L cached positions, n new ones, k soft tokens, H heads, G key-value heads, E width of a head,
C width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hllm_torchrec.modules.attention.keys_values import KeysValues
from hllm_torchrec.modules.attention.text import grouped_attention
from hllm_torchrec.modules.creative.creative_llm import CreativeLLM


@dataclass(frozen=True)
class DecodeOptions:
    """Options of `decode`.

    stop: id of the end token; most: maximum number of tokens, including the end token; temperature: 0 for greedy
    decoding, otherwise of sampling; top_k: sample from this number of likeliest tokens (0: from all); top_p: sample
    from the smallest set of likeliest tokens with at least this total probability; guidance: g > 0 chooses tokens by (1
    + g) log p(user) - g log p(null), where null is an unknown user.
    """

    stop: int
    most: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 0.0


@dataclass(frozen=True)
class Decoded:
    """Result of `decode`.

    tokens: int64 [B, <= most], -1 at the end token and after it; log_prob: float32 [B] log-likelihood of the tokens and
    the end token, without temperature, truncation and guidance; stopped: bool [B], False if `most` tokens have no end
    token.
    """

    tokens: Tensor
    log_prob: Tensor
    stopped: Tensor


class _CachedPlan:
    """Causal `TextPlan` for n new rows of each of B sequences after their cached positions; collects keys and values.

    cached: keys and values of each layer, [B, L, G, E], or [1, L, G, E] for a prefix that all sequences share; layers:
    keys and values of cached and new positions, added by each call of `attend`.
    """

    def __init__(self, cached: list[KeysValues], number: int, new: int, device: torch.device) -> None:
        self.cached, self.number = cached, number
        before = cached[0].keys.shape[1] if cached else 0
        self.position_ids = (before + torch.arange(new, device=device)).repeat(number)[None]
        self.longest = before + new
        self.layers: list[KeysValues] = []
        self.mask = None
        if before and new > 1:  # a single new row sees all keys; without cached positions, is_causal suffices
            self.mask = torch.ones(new, self.longest, dtype=torch.bool, device=device).tril(before)
        self.is_causal = not before

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """Attend as `TextPlan` says; called once per layer, in the order of the layers."""
        q, k, v = (x.unflatten(0, (self.number, -1)) for x in (query, key, value))
        if self.cached:
            old = self.cached[len(self.layers)]
            k, v = (torch.cat([x.expand(self.number, -1, -1, -1), y], 1) for x, y in ((old.keys, k), (old.values, v)))
        self.layers.append(KeysValues(k, v))
        return grouped_attention(q, k, v, self.mask, self.is_causal, scaling, dropout)


@torch.no_grad()
def decode(
    llm: CreativeLLM,
    before: Tensor,
    after: Tensor,
    soft: Tensor,
    options: DecodeOptions,
    generators: list[torch.Generator] | None = None,
    item_of: Tensor | None = None,
    null: Tensor | None = None,
) -> Decoded:
    """Generate a response for each of B (user, item) pairs with I items. The prompt is: before, soft tokens, after.

    All prompts have the same number of positions, so there is no padding. Responses do not depend on each other.

    Args:
        llm: the model, in evaluation mode.
        before, after: int64 [I, p], [I, a] tokens of the items' prompts before and after {user}; [p], [a] for one item.
        soft: [B, k, C] soft tokens.
        generators: a CPU generator for each pair; required for sampling.
        item_of: int64 [B] index of each pair's item; None: there is one item.
        null: [k, C] soft tokens of an unknown user; required for guidance.

    Raises:
        ValueError: sampling without a generator for each pair, or guidance without `null`.
    """
    number, device = soft.shape[0], soft.device
    if options.temperature > 0 and (generators is None or len(generators) != number):
        raise ValueError(f"sampling for {number} users needs a generator for each")
    of = torch.zeros(number, dtype=torch.int64, device=device) if item_of is None else item_of
    if options.guidance:
        if null is None:
            raise ValueError("guidance needs the soft tokens of an unknown user")
        # The second half of the rows are the same prompts with the tokens of an unknown user.
        soft, of = torch.cat([soft, null.to(soft.dtype).expand_as(soft)]), of.repeat(2)
    before, after = torch.atleast_2d(before), torch.atleast_2d(after)
    cached: list[KeysValues] = []
    if before.shape[1]:
        _, cached = _run(llm, llm.embed(before), [])
        if before.shape[0] > 1:
            cached = [KeysValues(one.keys[of], one.values[of]) for one in cached]
    behind = llm.embed(after)[of]
    hidden, cached = _run(llm, torch.cat([soft.to(behind.dtype), behind], 1), cached)
    written, log_prob = [], torch.zeros(number, device=device)
    stopped = torch.zeros(number, dtype=torch.bool, device=device)
    for step in range(options.most):
        log_p = (hidden[:, -1] @ llm.head_weight.to(hidden.dtype).T).float().log_softmax(-1)
        guided = log_p
        if options.guidance:
            log_p, of_null = log_p.chunk(2)
            guided = ((1 + options.guidance) * log_p - options.guidance * of_null).log_softmax(-1)
        token = _choose(guided, options, generators)
        log_prob += torch.where(stopped, 0.0, log_p.gather(1, token[:, None])[:, 0])
        ends = token == options.stop
        written.append(torch.where(stopped | ends, -1, token))
        stopped |= ends
        if bool(stopped.all()) or step + 1 == options.most:
            break
        if options.guidance:
            token = token.repeat(2)
        hidden, cached = _run(llm, llm.embed(token)[:, None], cached)
    return Decoded(torch.stack(written, 1), log_prob, stopped)


def _run(llm: CreativeLLM, rows: Tensor, cached: list[KeysValues]) -> tuple[Tensor, list[KeysValues]]:
    """Run the LLM on `rows` [B, n, C] after the cached positions; returns the last hidden states and the new cache."""
    number, new = rows.shape[:2]
    plan = _CachedPlan(cached, number, new, rows.device)
    positions = plan.position_ids + llm.first_position
    output = llm.backbone(
        inputs_embeds=rows.flatten(0, 1)[None], position_ids=positions, use_cache=False, hllm_plan=plan
    )
    return output.last_hidden_state[0].unflatten(0, (number, new)), plan.layers


def _choose(log_p: Tensor, options: DecodeOptions, generators: list[torch.Generator] | None) -> Tensor:
    """Choose the next tokens [B] by log-probabilities [B, V]. A row's sample depends only on the row's own
    generator."""
    if not options.temperature:
        return log_p.argmax(-1)
    assert generators is not None
    ordered, order = (log_p / options.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    hidden = ordered.cumsum(-1) - ordered >= options.top_p  # never removes the likeliest token
    if options.top_k:
        hidden[:, options.top_k :] = True
    kept = ordered.masked_fill(hidden, 0.0).double()
    draws = torch.tensor([torch.rand((), generator=one, dtype=torch.float64).item() for one in generators])
    place = torch.searchsorted(kept.cumsum(-1), draws.to(kept.device)[:, None] * kept.sum(-1, keepdim=True), right=True)
    # By rounding, a draw may fall beyond the last remaining token.
    place = torch.minimum(place, (kept > 0).sum(-1, keepdim=True) - 1)
    return order.gather(1, place)[:, 0]
