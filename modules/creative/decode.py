"""Decoding of responses for users of items: keys and values of what stands before {user} are computed once per item.

A small loop of the library's own, through the registered attention. (transformers' `generate` with `inputs_embeds` and
a cache of a prefix returns wrong tokens without a word: its issues 35707 and 36151.)

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
    """stop: id of the end token; most: maximum number of tokens with it; temperature: 0 for the likeliest token, else
    sampling; top_k: of the likeliest tokens (0: all); top_p: of the fewest that have this probability together;
    guidance: g of (1 + g) logits(user) - g logits(null), from which tokens are chosen."""

    stop: int
    most: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 0.0


@dataclass(frozen=True)
class Decoded:
    """tokens: int64 [B, <= most], the end token and what follows it are -1; log_prob: float32 [B], of the tokens with
    the end token, under the model's own distribution; stopped: bool [B], False where the maximum was reached."""

    tokens: Tensor
    log_prob: Tensor
    stopped: Tensor


class _CachedPlan:
    """Causal `TextPlan` for n rows of each of B sequences that follow cached positions; holds what it computes.

    cached: keys and values [1 or B, L, G, E] of each layer; those of one prefix are shared by all sequences until they
    have rows of their own.
    """

    def __init__(self, cached: list[KeysValues], number: int, new: int, device: torch.device) -> None:
        self.cached, self.number = cached, number
        before = cached[0].keys.shape[1] if cached else 0
        self.position_ids = (before + torch.arange(new, device=device)).repeat(number)[None]
        self.longest = before + new
        self.layers: list[KeysValues] = []
        self.mask = None
        if before and new > 1:  # one new row sees everything; without a cache is_causal suffices
            self.mask = torch.ones(new, self.longest, dtype=torch.bool, device=device).tril(before)
        self.is_causal = not before

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See `TextPlan`; called once per layer, in layer order."""
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
    """Generate a response for each of B users, each for one of I items. The prompt is: before, soft tokens, after.

    All prompts have the same number of positions, so there is no padding, and responses are independent of each other.

    Args:
        llm: in evaluation mode.
        before, after: int64 [I, p], [I, a], the prompts' tokens on both sides of {user}; of one item also [p], [a].
        soft: [B, k, C].
        generators: one for each user, on the CPU; needed for sampling.
        item_of: int64 [B] item of each user; None: there is one item.
        null: [k, C] soft tokens of an unknown user, which guidance needs.

    Raises:
        ValueError: sampling without generators, or guidance without `null`.
    """
    number, device = soft.shape[0], soft.device
    if options.temperature > 0 and (generators is None or len(generators) != number):
        raise ValueError(f"sampling for {number} users needs a generator for each")
    of = torch.zeros(number, dtype=torch.int64, device=device) if item_of is None else item_of
    if options.guidance:
        if null is None:
            raise ValueError("guidance needs the soft tokens of an unknown user")
        # The second half of the rows reads the same tokens as the first one, without the user.
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
    """Last hidden states [B, n, C] of `rows` [B, n, C] behind the cached positions, and the cache with them."""
    number, new = rows.shape[:2]
    plan = _CachedPlan(cached, number, new, rows.device)
    positions = plan.position_ids + llm.first_position
    output = llm.backbone(
        inputs_embeds=rows.flatten(0, 1)[None], position_ids=positions, use_cache=False, hllm_plan=plan
    )
    return output.last_hidden_state[0].unflatten(0, (number, new)), plan.layers


def _choose(log_p: Tensor, options: DecodeOptions, generators: list[torch.Generator] | None) -> Tensor:
    """Next token [B] of log-probabilities [B, V]; a user's draw depends on the user's generator alone."""
    if not options.temperature:
        return log_p.argmax(-1)
    assert generators is not None
    ordered, order = (log_p / options.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    hidden = ordered.cumsum(-1) - ordered >= options.top_p  # the first token is always kept
    if options.top_k:
        hidden[:, options.top_k :] = True
    kept = ordered.masked_fill(hidden, 0.0).double()
    draws = torch.tensor([torch.rand((), generator=one, dtype=torch.float64).item() for one in generators])
    place = torch.searchsorted(kept.cumsum(-1), draws.to(kept.device)[:, None] * kept.sum(-1, keepdim=True), right=True)
    # Rounding may carry a draw beyond the last token that is kept.
    place = torch.minimum(place, (kept > 0).sum(-1, keepdim=True) - 1)
    return order.gather(1, place)[:, 0]
