"""Checks that this library computes the same embeddings as transformers, on a small random model of the same config.

Packed attention replaces a model's attention function and mask. Some models have layers that do not use this function,
or have masks that the function does not implement (windows, position biases, sinks). In such a model items could attend
to each other, or embeddings would differ, without an error. So before a model is built, a small random model of its
config encodes texts of several lengths, and its values and gradients are compared with those of unpatched transformers,
which encodes one text at a time. The first of `ARRANGEMENTS` that agrees is used. Results are cached (`check_cache`).
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.common.foreign_files import first_line
from hllm_torchrec.models.check_cache import keep_result, kept_result
from hllm_torchrec.models.small_models import (
    NO_WINDOW,
    ROUNDING,
    TOLERANCE,
    apart,
    changed_direction,
    config_key,
    directed,
    item_token,
    last_states,
    plain_model,
    reads_causally,
    relative_difference,
    sample_texts,
    sensitivity,
    small_config,
)
from hllm_torchrec.modules.attention.packed import PACKED_ATTENTION, register_packed_attention
from hllm_torchrec.modules.encoders.backbone import TextReading
from hllm_torchrec.modules.encoders.base import Queries
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from hllm_torchrec.modules.encoders.user_llm import UserLLM

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ARRANGEMENTS = ("packed", "padded", "equal_lengths")
_SHARE = 0.05
"""Tolerance of a difference of embeddings, as a share of the influence of a text's other tokens."""
_DECODERS = "choose a decoder such as Llama, Mistral or Qwen, see docs/support.md"


def text_reading(config: "PreTrainedConfig", causal: bool | None = None) -> TextReading:
    """Find an arrangement of texts with which embeddings equal those that transformers computes for each text alone.

    causal: required direction; None: that of the config.

    Raises:
        ValueError: transformers cannot run the model on text, the model does not support the direction, or no
            arrangement gives the embeddings of transformers.
    """
    return _kept_text_reading(config_key(config), causal)


def check_user_backbone(config: "PreTrainedConfig") -> None:
    """Check that a model can be a User LLM: packed histories and query tokens equal one forward pass for each.

    Raises:
        ValueError: they differ, the model cannot be causal, or its inputs and states have different widths.
    """
    _kept_check_user(config_key(config))


@functools.lru_cache(maxsize=64)
def _kept_text_reading(key: str, causal: bool | None) -> TextReading:
    found = kept_result("text", key, causal)
    if not isinstance(found, dict) or found.keys() != {"arrangement", "causal"}:
        found = dataclasses.asdict(_text_reading(key, causal))
        keep_result(found, "text", key, causal)
    return TextReading(**found)


@functools.lru_cache(maxsize=64)
def _kept_check_user(key: str) -> None:
    if kept_result("user", key) is None:
        _check_user(key)
        keep_result(True, "user", key)


def _text_reading(key: str, causal: bool | None) -> TextReading:
    with apart():
        config = small_config(key)
        plain = plain_model(config)
        direction = reads_causally(plain)
        if causal is not None and causal != direction:
            config = changed_direction(config, causal)
            plain, direction = plain_model(config), causal
        want = _Encoded.of(plain, lambda: _one_by_one(plain, item_token(plain)))
        want.tolerance = min(TOLERANCE, _SHARE * sensitivity(plain))
        problems = []
        # If texts hardly change the states, a leak cannot be told from rounding: only equal lengths are safe then.
        for arrangement in ARRANGEMENTS if want.tolerance > ROUNDING else ARRANGEMENTS[-1:]:
            want.tolerance = max(want.tolerance, ROUNDING)
            reading = TextReading(arrangement, direction)  # type: ignore[arg-type]
            problem = _difference(config, plain, reading, want)
            if problem is None:
                return reading
            problems.append(f"{arrangement.replace('_', ' ')}: {problem}")
        raise ValueError(
            f"{config.model_type}: its embeddings are not those of transformers ({'; '.join(problems)}): choose "
            "another model, see the table in docs/support.md"
        )


def _check_user(key: str) -> None:
    with apart():
        wide = small_config(key, window=NO_WINDOW)
        plain = plain_model(wide)
        read = plain.get_input_embeddings().weight.shape[1]
        if read != wide.hidden_size:  # ALBERT's and ELECTRA's embedding_size, OPT's word_embed_proj_dim
            raise ValueError(
                f"{wide.model_type} as User LLM: reads vectors of another width than it writes: give its embeddings "
                f"the width hidden_size, or {_DECODERS}"
            )
        if not reads_causally(plain):
            try:
                wide = changed_direction(wide, True)
            except ArgumentError:
                raise ValueError(
                    f"{wide.model_type} as User LLM: reads in both directions, and transformers cannot change it: "
                    f"{_DECODERS}"
                ) from None
        narrow = directed(small_config(key), True)
        # Making ModernBERT causal does not change its windows, within which it still sees later positions.
        is_causal = reads_causally(plain_model(narrow))
        problem = _user_difference(wide) if is_causal else "it sees later positions within its windows"
        if problem is None:
            # Packed attention ignores a window that only the mask has, so longer histories must then be refused.
            problem = _user_difference(narrow, refusal_is_fine=True)
        if problem is not None:
            raise ValueError(
                f"{wide.model_type} as User LLM: not as transformers reads each history ({problem}): {_DECODERS}"
            )


# ---------------------------------------------------------------------------------------- Item LLM


class _Encoded:
    """Embeddings of the texts, and the gradients of the model's weights for a random projection of the embeddings."""

    def __init__(self, values: Tensor, gradients: dict[str, Tensor]) -> None:
        self.values, self.gradients = values, gradients
        self.tolerance = TOLERANCE

    @staticmethod
    def of(model: nn.Module, encode: Callable[[], Tensor]) -> "_Encoded":
        values = encode()
        weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
        (values * weights).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return _Encoded(values.detach(), gradients)

    def difference(self, other: "_Encoded") -> str | None:
        """Description of a difference from `other`; None if all differences are within the tolerance."""
        if (far := relative_difference(self.values, other.values)) >= self.tolerance:
            return f"values differ by {far:.1g} of the largest"
        scale = max((g.abs().max().item() for g in self.gradients.values()), default=0.0) or 1.0
        for name in self.gradients.keys() | other.gradients.keys():
            one, two = self.gradients.get(name), other.gradients.get(name)
            some = one if one is not None else two
            assert some is not None
            one, two = (torch.zeros_like(some) if g is None else g for g in (one, two))
            if (far := (one - two).abs().max().item() / scale) >= TOLERANCE:
                return f"gradients of {name} differ by {far:.1g} of the largest"
        return None


def _one_by_one(plain: "PreTrainedModel", token: Tensor) -> Tensor:
    """[texts, 3, E] by plain transformers, one text at a time: mean state, last state, state of [ITEM] after it."""
    words, rows = plain.get_input_embeddings(), []
    for text in sample_texts():
        states = last_states(plain, input_ids=text[None])
        with_item = torch.cat([words(text), token[None]])
        rows.append(torch.stack([states.mean(0), states[-1], last_states(plain, inputs_embeds=with_item[None])[-1]]))
    return torch.stack(rows)


def _difference(
    config: "PreTrainedConfig", plain: "PreTrainedModel", reading: TextReading, want: _Encoded
) -> str | None:
    """Description of the difference of this library's embeddings from `want`; None if they agree."""
    try:
        model = _same_weights(config, plain, PACKED_ATTENTION if reading.arrangement == "packed" else None)
        model.hllm_reading = reading
        return want.difference(_Encoded.of(model, lambda: _by_item_llm(model, item_token(plain))))
    except Exception as error:  # a model may raise anything for arguments that it does not support
        return first_line(error)


def _same_weights(
    config: "PreTrainedConfig", plain: "PreTrainedModel", attention: str | None, words: bool = True
) -> "PreTrainedModel":
    from transformers import AutoModel

    register_packed_attention()
    config = copy.deepcopy(config)
    if attention is not None:
        config._attn_implementation = attention
    model: PreTrainedModel = AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32)
    model.load_state_dict(plain.state_dict())
    if not words:
        model.set_input_embeddings(None)
    return model.eval()


def _by_item_llm(model: "PreTrainedModel", token: Tensor) -> Tensor:
    """The result of `_one_by_one`, by the Item LLM on all texts at once; [ITEM] with a shared prefix if supported."""
    texts = sample_texts()
    offsets = torch.tensor([0, *(len(text) for text in texts)]).cumsum(0)
    rows = []
    for pooling in ("mean", "last", "item"):
        llm = ItemLLM(model, pooling).eval()
        llm.item_token = nn.Parameter(token)
        rows.append(llm(torch.cat(texts), offsets))
    if llm.shares_prefix:
        rows[-1] = _behind_prefix(llm, texts)
    return torch.stack(rows, dim=1)


def _behind_prefix(llm: ItemLLM, texts: list[Tensor]) -> Tensor:
    """Embeddings of the texts, where the beginning of the first (longest) text is a prefix that only this text has."""
    prefix, rest = texts[0][:3], [texts[0][3:], *texts[1:]]
    offsets = torch.tensor([0, *(len(text) for text in rest)]).cumsum(0)
    return llm(torch.cat(rest), offsets, prefix, torch.tensor([True, *(False for _ in texts[1:])]))


# ---------------------------------------------------------------------------------------- User LLM


def _user_difference(config: "PreTrainedConfig", refusal_is_fine: bool = False) -> str | None:
    """Description of the difference between packed histories with queries and transformers on each one, or None."""
    plain = plain_model(config)
    width = plain.get_input_embeddings().weight.shape[1]
    lengths, visible = (12, 5, 0), (7, 12, 3, 0)  # the last sequence has a query and no history
    offsets, queries = torch.tensor([0, *lengths]).cumsum(0), torch.tensor([0, 2, 3, 4])
    x = torch.randn(int(offsets[-1]) + len(visible), width, generator=torch.Generator().manual_seed(3))
    want = _Encoded.of(plain, lambda: _histories_alone(plain, x, offsets, queries, visible))
    try:
        model = UserLLM(_same_weights(config, plain, PACKED_ATTENTION, words=False)).eval()
        asked = Queries(
            x[-len(visible) :], queries, torch.tensor(visible), torch.zeros(len(visible), dtype=torch.int64)
        )
        history, times = x[: -len(visible)], torch.zeros(int(offsets[-1]), dtype=torch.int64)
        return want.difference(_Encoded.of(model.backbone, lambda: torch.cat(model(history, offsets, times, asked))))
    except ArgumentError as error:
        return None if refusal_is_fine else first_line(error)
    except Exception as error:
        return first_line(error)


def _histories_alone(
    plain: "PreTrainedModel", x: Tensor, offsets: Tensor, queries: Tensor, visible: tuple[int, ...]
) -> Tensor:
    histories, total = [], int(offsets[-1])
    answers = []
    for sequence in range(len(offsets) - 1):
        history = x[offsets[sequence] : offsets[sequence + 1]]
        if len(history):
            histories.append(last_states(plain, inputs_embeds=history[None]))
        for query in range(int(queries[sequence]), int(queries[sequence + 1])):
            seen = torch.cat([history[: visible[query]], x[total + query][None]])
            answers.append(last_states(plain, inputs_embeds=seen[None])[-1:])
    return torch.cat([*histories, *answers])
