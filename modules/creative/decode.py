"""Decoding of responses for (user, item) pairs. Keys and values of the tokens before {user} are computed once per item.

The decoding loop is our own, because `generate` of transformers silently returns wrong tokens if it gets
`inputs_embeds` and the cache of a prefix (issues 35707 and 36151 of transformers).

Legend: I items, B pairs, b items or pairs, p and a tokens of a prompt before and after {user}, k soft tokens, n new
positions, C width, V words.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hllm_torchrec.modules.creative.creative_llm import CreativeLLM
from hllm_torchrec.modules.creative.decode_cache import PrefixPlan, UserPlan


@dataclass(frozen=True)
class DecodeOptions:
    """Options of `decode`.

    stop: id of the end token; most: maximum number of tokens, including the end token; temperature: of sampling, 0:
    greedy decoding; top_k: sample from this number of likeliest tokens (0: from all); top_p: sample from the smallest
    set of likeliest tokens with at least this total probability; guidance: g > 0 chooses tokens by
    (1 + g) log p(user) - g log p(null), where null is an unknown user.
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
    after_lengths: Tensor | None = None,
) -> Decoded:
    """Generate a response for each of B (user, item) pairs with I items. The prompt is: before, soft tokens, after.

    Responses are independent of each other.

    Args:
        llm: the model, in evaluation mode.
        before, after: int64 [I, p], [I, a] tokens of the items' prompts before and after {user}; [p], [a] for one item.
        soft: [B, k, C] soft tokens.
        generators: a CPU generator for each pair; required for sampling.
        item_of: int64 [B] index of each pair's item; None: there is one item.
        null: [k, C] soft tokens of an unknown user; required for guidance.
        after_lengths: int64 [I], number of tokens in each row of `after`, the others are padding; None: all.

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
    # Items with the same tokens before {user} share one prefix.
    same = torch.arange(before.shape[0], device=device)
    if before.shape[1]:
        before, same = before.unique(dim=0, return_inverse=True)
    prefix = PrefixPlan(before.shape[0], before.shape[1], device)
    if before.shape[1]:
        run(llm, llm.embed(before), prefix)
    behind = llm.embed(after)[of]
    lengths = None if after_lengths is None else soft.shape[1] + after_lengths.to(device)[of]
    plan = UserPlan(prefix.layers, same[of], soft.shape[1] + after.shape[1] + options.most - 1, lengths)
    hidden = _next(llm, torch.cat([soft.to(behind.dtype), behind], 1), plan)
    head = _head(llm, hidden)
    written, log_prob = [], torch.zeros(number, device=device)
    stopped = torch.zeros(number, dtype=torch.bool, device=device)
    for step in range(options.most):
        log_p = (hidden @ head.T).float().log_softmax(-1)
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
        hidden = _next(llm, llm.embed(token)[:, None], plan)
    return Decoded(torch.stack(written, 1), log_prob, stopped)


def run(llm: CreativeLLM, rows: Tensor, plan: PrefixPlan | UserPlan) -> Tensor:
    """Run the LLM on `rows` [b, n, C] with the attention `plan`; returns the last hidden states [b, n, C]."""
    return llm.run_backbone(rows.flatten(0, 1), plan).unflatten(0, rows.shape[:2])


def _next(llm: CreativeLLM, rows: Tensor, plan: UserPlan) -> Tensor:
    """Run the LLM on the next n positions [B, n, C] of each user; returns the hidden states [B, C] of the last ones."""
    plan.advance(rows.shape[1])
    hidden = run(llm, rows, plan)
    if plan.lengths is None or rows.shape[1] == 1:
        return hidden[:, -1]
    return hidden[torch.arange(plan.number, device=hidden.device), plan.lengths - 1]


def _head(llm: CreativeLLM, hidden: Tensor) -> Tensor:
    """Return the weight [V, C] of the vocabulary head in the dtype of its product: one cast for all steps."""
    is_autocast, device = torch.is_autocast_enabled(hidden.device.type), hidden.device.type
    return llm.head_weight.to(torch.get_autocast_dtype(device) if is_autocast else hidden.dtype)


def _choose(log_p: Tensor, options: DecodeOptions, generators: list[torch.Generator] | None) -> Tensor:
    """Choose the next tokens [B] by log-probabilities [B, V]. A row's sample depends only on the row's own
    generator."""
    if not options.temperature:
        return log_p.max(-1).indices  # faster than argmax on a CPU
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
