"""Conversion of training state for checkpoints: tensors by dotted keys, JSON values, random number generators."""

import base64
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor


def rng_state() -> dict[str, Any]:
    """Return the states of this process's random number generators as JSON values.

    The generators are torch's on the CPU and on the current CUDA device, numpy's and Python's.
    """
    numpy_state: Any = np.random.get_state(legacy=False)
    version, internal, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return {
        "torch": _encode(torch.get_rng_state()),
        "cuda": None if cuda is None else _encode(cuda),
        "numpy": {
            **numpy_state,
            "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()},
        },
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Set the random number generators to the states that `rng_state` returned.

    Raises:
        ValueError: `state` has another form or is of other versions; some generators may have been set already.
    """
    try:
        torch.set_rng_state(_decode(state["torch"]))
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(_decode(state["cuda"]))
        np.random.set_state(state["numpy"])
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the saved random number state cannot be used ({type(error).__name__}: {error}); "
            "resume with the versions of torch, numpy and Python that wrote it, or start with a new seed"
        ) from error


def _encode(state: torch.Tensor) -> str:
    """Encode a uint8 tensor as base64 text."""
    return base64.b64encode(bytes(state.tolist())).decode()


def _decode(text: str) -> torch.Tensor:
    """Decode base64 text to a uint8 tensor."""
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)


def flatten(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Turn nested mappings and lists of tensors into one dictionary with dotted keys.

    Raises:
        ValueError: a value is not a tensor, a tensor is on the meta device, or two values have the same key.
    """
    flat: dict[str, torch.Tensor] = {}
    for key, value in _leaves("", state):
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"state {key!r} is a {type(value).__name__}; a checkpoint's state holds tensors only: "
                "put what JSON can hold into extra"
            )
        if not isinstance(value, ShardedTensor) and value.is_meta:  # ShardedTensor does not always support it
            raise ValueError(f"state {key!r} is on the meta device; materialize the model first")
        if key in flat:
            raise ValueError(f"state {key!r} occurs twice; rename one of its parts")
        flat[key] = value
    return flat


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every value that is neither a mapping nor a sequence."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        yield prefix, value
        return
    for key, child in items:
        yield from _leaves(f"{prefix}.{key}" if prefix else str(key), child)


def is_under(key: str, prefixes: Iterable[str]) -> bool:
    """Return True if a dotted key equals one of the prefixes or is below one of them."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def check_json(name: str, value: Any) -> None:
    """Check that a value consists of types that JSON has, so that it can be read again unchanged.

    Raises:
        ValueError: a value has another type, or a key is not a string; the message contains its path.
    """
    if isinstance(value, Mapping):
        for key, child in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{name}: key {key!r} is not a string, which JSON needs")
            check_json(f"{name}: {key}", child)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            check_json(f"{name}[{index}]", child)
    elif value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{name} is a {type(value).__name__}; JSON holds text, numbers, lists and dictionaries only")
