"""Checks that a Hugging Face model is read as transformers reads it, on a small random model of the same config.

Packed attention replaces a model's attention function and mask. A model whose layers do not use that function, or
that adds to the mask what the function does not know (windows, position biases, sinks), would let items see one
another, or give other embeddings, without an error. So before a model is built, a copy with few layers, narrow and with
random weights encodes texts of several lengths, and is compared, values and gradients, with unpatched transformers
that reads them one at a time. Of `ARRANGEMENTS` the first that agrees is used. Results are kept for the process.

`directed` changes the direction in which a config reads; the direction of a config is found by changing a text's last
token.
"""

import copy
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hllm_torchrec.common.errors import ArgumentError
from hllm_torchrec.common.foreign_files import first_line
from hllm_torchrec.modules.attention.packed import PACKED_ATTENTION, register_packed_attention
from hllm_torchrec.modules.encoders.backbone import TextReading
from hllm_torchrec.modules.encoders.base import Queries
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from hllm_torchrec.modules.encoders.user_llm import UserLLM

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ARRANGEMENTS = ("packed", "padded", "equal_lengths")
TOLERANCE = 1e-3
"""Largest difference from plain transformers, relative to the largest value; float32 rounds at about 1e-6."""
LENGTHS = (12, 1, 5, 9, 5)
"""Tokens of the compared texts; some are longer than `_WINDOW`."""
_WINDOW, _NO_WINDOW, _VOCABULARY, _FIRST_WORD = 6, 512, 96, 8
_PLACES, _LEAST_PLACES = "max_position_embeddings", 64
_NARROW = {"intermediate_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
_OF_HEADS = ("num_attention_heads", "num_key_value_heads", "hidden_size")
_WINDOWS = ("sliding_window", "local_attention", "attention_chunk_size")


def text_reading(config: "PreTrainedConfig", causal: bool | None = None) -> TextReading:
    """Find how texts can be given to a model so that it reads each as transformers reads it alone.

    causal: direction that is asked for; None: the config's own.

    Raises:
        ValueError: transformers cannot run the model on text, the model cannot read in that direction, or no
            arrangement gives its embeddings.
    """
    return _text_reading(_key(config), causal)


def check_user_backbone(config: "PreTrainedConfig") -> None:
    """Check that a model can be a User LLM: packed histories and query tokens equal one forward pass for each.

    Raises:
        ValueError: they differ, or the model cannot be causal.
    """
    _check_user(_key(config))


def directed(config: "PreTrainedConfig", causal: bool | None) -> "PreTrainedConfig":
    """A copy of the config with the switches of direction that transformers' models have; None: the config's own."""
    config = copy.deepcopy(config)
    if causal is None or is_causal(config) == causal:
        return config
    config.is_causal = causal
    for name, value in (("is_decoder", causal), ("use_bidirectional_attention", not causal)):
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def is_causal(config: "PreTrainedConfig") -> bool:
    """Whether transformers' model reads a text from left to right. Raises like `text_reading`."""
    return _is_causal(_key(config))


def _key(config: "PreTrainedConfig") -> str:
    """Everything of a config that its model depends on, as text."""
    # to_dict keeps what config.json says; names and versions change nothing.
    facts = config.to_dict()
    for name in ("_name_or_path", "transformers_version", "architectures", "dtype", "auto_map"):
        facts.pop(name, None)
    return json.dumps(facts, sort_keys=True, default=str)


@functools.lru_cache(maxsize=64)
def _is_causal(key: str) -> bool:
    with _apart():
        return _reads_causally(_plain(small_config(key)), key)


@functools.lru_cache(maxsize=64)
def _text_reading(key: str, causal: bool | None) -> TextReading:
    with _apart():
        config = small_config(key)
        plain = _plain(config)
        direction = _reads_causally(plain, key)
        if causal is not None and causal != direction:
            config = _changed_direction(config, causal)
            plain, direction = _plain(config), causal
        want = _Encoded.of(plain, lambda: _one_by_one(plain, item_token(plain)))
        problems = []
        for arrangement in ARRANGEMENTS:
            reading = TextReading(arrangement, direction)  # type: ignore[arg-type]
            problem = _difference(config, plain, reading, want)
            if problem is None:
                return reading
            problems.append(f"{arrangement.replace('_', ' ')}: {problem}")
        raise ValueError(
            f"{config.model_type}: its embeddings are not those of transformers ({'; '.join(problems)}): choose "
            "another model, see the table in docs/support.md"
        )


@functools.lru_cache(maxsize=64)
def _check_user(key: str) -> None:
    with _apart():
        wide = small_config(key, window=_NO_WINDOW)
        if not _reads_causally(_plain(wide), key):
            wide = _changed_direction(wide, True)
        problem = _user_difference(wide)
        if problem is None:
            narrow = directed(small_config(key), True)
            # A window must be applied, or refused where a history is longer; a mask alone is lost when packed.
            problem = _user_difference(narrow, refusal_is_fine=True)
        if problem is not None:
            raise ValueError(
                f"{wide.model_type} as User LLM: not as transformers reads each history ({problem}): choose a decoder "
                "such as Llama, Mistral or Qwen, see docs/support.md"
            )


def _changed_direction(config: "PreTrainedConfig", causal: bool) -> "PreTrainedConfig":
    """The small config in the other direction. Raises ArgumentError where transformers' model has no such switch."""
    changed = copy.deepcopy(config)
    changed = directed(changed, causal)
    if _reads_causally(_plain(changed), config.model_type) != causal:
        raise ArgumentError(
            f"causal: {causal}: {config.model_type} reads with causal: {not causal}, and transformers cannot change "
            "it; leave the option out"
        )
    return changed


# ---------------------------------------------------------------------------------------- small models


@contextmanager
def _apart() -> Iterator[None]:
    """Context manager: on the CPU, with a seed of its own, and without effect on the caller's random numbers."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    register_packed_attention()
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def small_config(key: str, window: int = _WINDOW) -> "PreTrainedConfig":
    """The config of `_key` with one layer of each kind (at least two), narrow, and with sliding windows of `window`."""
    from transformers import AutoConfig

    facts = json.loads(key)
    names = type(AutoConfig.for_model(**facts)).attribute_map  # e.g. hidden_size -> n_embd
    layers = facts[names.get("num_hidden_layers", "num_hidden_layers")]
    kept = _kinds_of_layers(facts, layers)
    facts |= {name: [value[i] for i in kept] for name, value in _per_layer(facts, layers)}
    wanted: dict[str, Any] = {"num_hidden_layers": len(kept), "vocab_size": _VOCABULARY, **_NARROW}
    wanted |= dict.fromkeys(_WINDOWS, window)
    wanted["max_position_embeddings"] = max(facts.get(names.get(_PLACES, _PLACES)) or 0, _LEAST_PLACES)
    wanted |= _fewer_heads({name: facts.get(names.get(name, name)) for name in _OF_HEADS})
    if "hidden_size" in wanted and facts.get("word_embed_proj_dim") == facts.get("hidden_size"):  # OPT's
        wanted["word_embed_proj_dim"] = wanted["hidden_size"]
    facts |= {names.get(name, name): value for name, value in wanted.items() if facts.get(names.get(name, name))}
    for name, value in facts.items():
        if name.endswith("_token_id") and isinstance(value, int) and value >= _FIRST_WORD:
            facts[name] = 1
    return AutoConfig.for_model(**facts)


def _per_layer(facts: dict[str, Any], layers: int) -> Iterator[tuple[str, list[Any]]]:
    """Fields that are lists with an entry for each layer."""
    for name, value in facts.items():
        if isinstance(value, list) and len(value) == layers and layers > 1:
            yield name, value


def _kinds_of_layers(facts: dict[str, Any], layers: int) -> list[int]:
    """Number of the first layer of each kind; at least two layers if the model has two."""
    first: dict[str, int] = {}
    columns = [value for _, value in _per_layer(facts, layers)]
    for layer in range(layers):
        first.setdefault(json.dumps([column[layer] for column in columns], default=str), layer)
    kept = sorted(first.values())[:4]
    return kept if len(kept) > 1 or layers == 1 else [kept[0], layers - 1]


def _fewer_heads(facts: dict[str, Any]) -> dict[str, int]:
    """Fields of a model with at most four heads of the same width, and the same sharing of keys."""
    heads, width = facts["num_attention_heads"], facts["hidden_size"]
    shared = facts["num_key_value_heads"] or heads
    if not all(isinstance(number, int) for number in (heads, width, shared)) or heads <= 4:
        return {}
    if width % heads or heads % shared:
        return {}
    few = min(shared, 2)
    number = few * min(heads // shared, 2)
    return {"num_attention_heads": number, "num_key_value_heads": few, "hidden_size": number * (width // heads)}


def _plain(config: "PreTrainedConfig") -> "PreTrainedModel":
    """The unpatched model with random weights that differ more than the initial ones, in evaluation mode.

    Raises:
        ValueError: transformers cannot build it.
    """
    from transformers import AutoModel

    try:
        model: PreTrainedModel = AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    except Exception as error:
        raise ValueError(
            f"{config.model_type}: transformers cannot build a small model of its config.json ({first_line(error)}); "
            "correct it, or fetch the directory again"
        ) from error
    return model.eval()


def _texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(_FIRST_WORD, _VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def _reads_causally(plain: "PreTrainedModel", name: str) -> bool:
    """Whether the states before a text's last token are the same whatever that token is."""
    text = _texts()[0]
    other = text.clone()
    other[-1] = _FIRST_WORD if text[-1] != _FIRST_WORD else _FIRST_WORD + 1
    with torch.no_grad():
        first, second = (_states(plain, input_ids=t[None])[:-1] for t in (text, other))
    return _apart_by(first, second) < TOLERANCE


def _states(model: "PreTrainedModel", **inputs: Tensor) -> Tensor:
    """Last hidden states [N, D] of one text. Raises ValueError if the model does not run on text alone."""
    try:
        states: Tensor = model(**inputs).last_hidden_state[0]
    except Exception as error:
        raise ValueError(
            f"{model.config.model_type}: transformers does not run it on text alone ({first_line(error)}): choose a "
            "decoder or an encoder of text, see docs/support.md"
        ) from error
    return states


def item_token(model: "PreTrainedModel") -> Tensor:
    """A vector in the place of [ITEM]."""
    words = model.get_input_embeddings().weight
    return words.detach()[_FIRST_WORD : _FIRST_WORD + 3].mean(0)


# ---------------------------------------------------------------------------------------- Item LLM


class _Encoded:
    """Embeddings of the texts and the gradients of a model's weights with respect to them."""

    def __init__(self, values: Tensor, gradients: dict[str, Tensor]) -> None:
        self.values, self.gradients = values, gradients

    @staticmethod
    def of(model: nn.Module, encode: Callable[[], Tensor]) -> "_Encoded":
        values = encode()
        weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
        (values * weights).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return _Encoded(values.detach(), gradients)

    def difference(self, other: "_Encoded") -> str | None:
        """The largest difference of `other`, in words; None if it is rounding."""
        if (far := _apart_by(self.values, other.values)) >= TOLERANCE:
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


def _apart_by(one: Tensor, two: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where one is not finite."""
    scale = max(one.abs().max().item(), 1e-30)
    far = (one - two).abs().max().item() / scale
    return far if far == far else float("inf")


def _one_by_one(plain: "PreTrainedModel", token: Tensor) -> Tensor:
    """By plain transformers, one text at a time: its mean and last state, and the state of [ITEM] after it."""
    words, rows = plain.get_input_embeddings(), []
    for text in _texts():
        states = _states(plain, input_ids=text[None])
        with_item = torch.cat([words(text), token[None]])
        rows.append(torch.stack([states.mean(0), states[-1], _states(plain, inputs_embeds=with_item[None])[-1]]))
    return torch.stack(rows)


def _difference(
    config: "PreTrainedConfig", plain: "PreTrainedModel", reading: TextReading, want: _Encoded
) -> str | None:
    """How our embeddings differ from `want`, in words; None if they agree."""
    try:
        model = _same_weights(config, plain, PACKED_ATTENTION if reading.arrangement == "packed" else None)
        model.hllm_reading = reading
        return want.difference(_Encoded.of(model, lambda: _by_item_llm(model, item_token(plain))))
    except Exception as error:  # what a model does with arguments that it does not know
        return first_line(error)


def _same_weights(
    config: "PreTrainedConfig", plain: "PreTrainedModel", attention: str | None, words: bool = True
) -> "PreTrainedModel":
    from transformers import AutoModel

    config = copy.deepcopy(config)
    if attention is not None:
        config._attn_implementation = attention
    model: PreTrainedModel = AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32)
    model.load_state_dict(plain.state_dict())
    if not words:
        model.set_input_embeddings(None)
    return model.eval()


def _by_item_llm(model: "PreTrainedModel", token: Tensor) -> Tensor:
    """What `_one_by_one` computes, by the Item LLM on all texts at once; the means with a shared prefix if it can."""
    texts = _texts()
    offsets = torch.tensor([0, *(len(text) for text in texts)]).cumsum(0)
    rows = []
    for pooling in ("mean", "last", "item"):
        llm = ItemLLM(model, pooling).eval()  # type: ignore[arg-type]
        llm.item_token = nn.Parameter(token)
        rows.append(llm(torch.cat(texts), offsets))
    if llm.shares_prefix:
        rows[1] = _behind_prefix(ItemLLM(model, "last"), texts)
    return torch.stack(rows, dim=1)


def _behind_prefix(llm: ItemLLM, texts: list[Tensor]) -> Tensor:
    """The last states, the first and longest text's beginning being a prefix that it shares with nobody."""
    prefix, rest = texts[0][:3], [texts[0][3:], *texts[1:]]
    offsets = torch.tensor([0, *(len(text) for text in rest)]).cumsum(0)
    return llm(torch.cat(rest), offsets, prefix, torch.tensor([True, *(False for _ in texts[1:])]))


# ---------------------------------------------------------------------------------------- User LLM


def _user_difference(config: "PreTrainedConfig", refusal_is_fine: bool = False) -> str | None:
    """How packed histories with query tokens differ from transformers on each alone, in words; None if they agree."""
    plain = _plain(config)
    width = plain.get_input_embeddings().weight.shape[1]
    lengths, visible = (LENGTHS[0], LENGTHS[2], 0), (7, 12, 3, 0)  # the last sequence has a query and no history
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
            histories.append(_states(plain, inputs_embeds=history[None]))
        for query in range(int(queries[sequence]), int(queries[sequence + 1])):
            seen = torch.cat([history[: visible[query]], x[total + query][None]])
            answers.append(_states(plain, inputs_embeds=seen[None])[-1:])
    return torch.cat([*histories, *answers])
