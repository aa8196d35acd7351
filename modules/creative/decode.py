"""Decoding of responses for users of items: keys and values of what stands before {user} are computed once per item.

A small loop of the library's own, through the registered attention. (transformers' `generate` with `inputs_embeds` and
a cache of a prefix returns wrong tokens without a word: its issues 35707 and 36151.)

Legend: I items, B users, p and a tokens of a prompt before and after {user}, k soft tokens, n new positions, C width,
V words.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hllm_torchrec.modules.creative.creative_llm import CreativeLLM
from hllm_torchrec.modules.creative.decode_cache import PrefixPlan, UserPlan


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
    """Generate a response for each of B users, each for one of I items. The prompt is: before, soft tokens, after.

    Responses are independent of each other.

    Args:
        llm: in evaluation mode.
        before, after: int64 [I, p], [I, a], the prompts' tokens on both sides of {user}; of one item also [p], [a].
        soft: [B, k, C].
        generators: one for each user, on the CPU; needed for sampling.
        item_of: int64 [B] item of each user; None: there is one item.
        null: [k, C] soft tokens of an unknown user, which guidance needs.
        after_lengths: int64 [I], number of tokens in each row of `after`, the others are padding; None: all.

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
    # Items whose prompts begin with the same tokens share them, too.
    same = torch.arange(before.shape[0], device=device)
    if before.shape[1]:
        before, same = before.unique(dim=0, return_inverse=True)
    prefix = PrefixPlan(*before.shape, device)
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
    """Last hidden states [b, n, C] of `rows` [b, n, C], whose attention is `plan`."""
    positions = plan.position_ids + llm.first_position
    output = llm.backbone(
        inputs_embeds=rows.flatten(0, 1)[None], position_ids=positions, use_cache=False, hllm_plan=plan
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden.unflatten(0, rows.shape[:2])


def _next(llm: CreativeLLM, rows: Tensor, plan: UserPlan) -> Tensor:
    """Hidden state [B, C] of the last of n more positions [B, n, C] of each user."""
    plan.advance(rows.shape[1])
    hidden = run(llm, rows, plan)
    if plan.lengths is None or rows.shape[1] == 1:
        return hidden[:, -1]
    return hidden[torch.arange(plan.number, device=hidden.device), plan.lengths - 1]


def _head(llm: CreativeLLM, hidden: Tensor) -> Tensor:
    """[V, C] of the vocabulary head in the dtype of its product, cast once for all steps."""
    is_autocast, device = torch.is_autocast_enabled(hidden.device.type), hidden.device.type
    return llm.head_weight.to(torch.get_autocast_dtype(device) if is_autocast else hidden.dtype)


def _choose(log_p: Tensor, options: DecodeOptions, generators: list[torch.Generator] | None) -> Tensor:
    """Next token [B] of log-probabilities [B, V]; a user's draw depends on the user's generator alone."""
    if not options.temperature:
        return log_p.max(-1).indices  # faster than argmax on a CPU
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
