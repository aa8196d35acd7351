"""Custom code that a configuration names as `module:name`: a user encoder or a numeric feature.

The module is imported normally: it must be installed on every rank, or its folder must be on PYTHONPATH. It is not
copied into the run directory, so later jobs on the run (evaluation, embedding) need the module again.

A run directory may come from someone else, and importing a module executes it. Therefore the code that the
configuration *of a run* names must be allowed (`--allow-code`, or a list in the environment variable HLLM_ALLOW_CODE),
or have been imported already.
"""

import dataclasses
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from hllm_torchrec.common.errors import did_you_mean
from hllm_torchrec.modules.encoders.shapes import ENCODERS, SHAPE_BOUNDS

EXTENSION_FORM = "module:Name of your own"
"""Description of the form `module:name` for messages."""


ALLOWED_CODE = "HLLM_ALLOW_CODE"
"""Environment variable: comma-separated list of the modules that the configuration of a run may import, each with its
submodules; or `*` for all modules."""

_reads_a_run: ContextVar[bool] = ContextVar("_reads_a_run", default=False)
_all_is_allowed: ContextVar[bool] = ContextVar("_all_is_allowed", default=False)


@contextmanager
def code_needs_permission(needed: bool = True) -> Iterator[None]:
    """Context manager for reading the configuration of a run: in it, extensions are loaded only if they are allowed."""
    token = _reads_a_run.set(needed)
    try:
        yield
    finally:
        _reads_a_run.reset(token)


@contextmanager
def code_is_allowed(allowed: bool = True) -> Iterator[None]:
    """Context manager in which, if `allowed`, the configuration of a run may import any module (`--allow-code`)."""
    token = _all_is_allowed.set(allowed)
    try:
        yield
    finally:
        _all_is_allowed.reset(token)


def check_permission(text: str, field: str) -> None:
    """Check that `text`, `module:name`, may be imported here.

    Raises:
        ValueError: the name comes from the configuration of a run, and the module is neither allowed nor imported.
    """
    module = text.partition(":")[0]
    # That a module of the standard library is imported does not mean that the user trusts this use of it.
    is_here = module in sys.modules and module.partition(".")[0] not in sys.stdlib_module_names
    if not _reads_a_run.get() or _all_is_allowed.get() or is_here:
        return
    allowed = [name.strip() for name in os.environ.get(ALLOWED_CODE, "").split(",")]
    if not any(name == "*" or name == module or module.startswith(f"{name}.") for name in allowed if name):
        raise ValueError(
            f"{field}: {text!r}: the run's configuration names code, which would be executed: if you trust it, use "
            f"--allow-code or set {ALLOWED_CODE}={module}"
        )


def is_extension(name: str) -> bool:
    """True if a name in the configuration refers to custom code."""
    return ":" in name


def load_extension(text: str, field: str) -> Any:
    """Import the object that `text`, `module:name`, refers to.

    Args:
        field: dotted field of the configuration, for the message.

    Raises:
        ValueError: the module or the name in it does not exist; or the configuration is that of a run, and the module
            is not allowed.
    """
    check_permission(text, field)
    module, _, name = text.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        # Other messages are kept: that of a module that has moved (`hllm_torchrec._moved`) contains the new name.
        is_missing = f"{module}.".startswith(f"{error.name}.") and str(error).startswith("No module named")
        remedy = f"there is no module {module!r}: install it, or put its folder on PYTHONPATH"
        why = remedy if is_missing else str(error)
        raise ValueError(f"{field}: {text!r}: {why}") from error
    if not hasattr(found, name):
        raise ValueError(f"{field}: {text!r}: {found.__file__} has no {name!r}{did_you_mean(name, vars(found))}")
    return getattr(found, name)


def encoder_shape(encoder: str) -> type:
    """Return the dataclass of `user.shape` for any `user.encoder` except llm; the built-in ones do not import torch.

    Raises:
        ValueError: the name is unknown, or the class is not a user encoder.
    """
    if encoder in ENCODERS:
        return ENCODERS[encoder].shape
    if not is_extension(encoder):
        names = ("llm", *ENCODERS)
        raise ValueError(
            f"user.encoder: {encoder!r}: must be one of {', '.join(names)}, or "
            f"{EXTENSION_FORM}{did_you_mean(encoder, names)}"
        )
    shape: type = load_user_encoder(encoder).Shape
    return shape


def shape_bounds(encoder: str, shape: Any) -> dict[str, str]:
    """Return field -> range for the fields of an encoder's shape that have a range."""
    specific = ENCODERS[encoder].bounds if encoder in ENCODERS else {}
    return {name: bound for name, bound in {**SHAPE_BOUNDS, **specific}.items() if hasattr(shape, name)}


def load_user_encoder(encoder: str) -> Any:
    """Return the class that `user.encoder` names, of `ENCODERS` or as `module:Name`; its arguments: (shape, dropout).

    Raises:
        ValueError: the class does not exist, is not a `UserEncoder`, or does not declare its `Shape`.
    """
    if encoder in ENCODERS:
        module, _, name = ENCODERS[encoder].path.partition(":")
        return getattr(importlib.import_module(module), name)
    from hllm_torchrec.modules.encoders.base import UserEncoder

    found = load_extension(encoder, "user.encoder")
    if not (isinstance(found, type) and issubclass(found, UserEncoder)):
        raise ValueError(
            f"user.encoder: {encoder!r}: must be a subclass of hllm_torchrec.modules.encoders.base.UserEncoder"
        )
    shape = getattr(found, "Shape", None)
    fields = {field.name for field in dataclasses.fields(shape)} if dataclasses.is_dataclass(shape) else set()
    if not {"width", "layers"} <= fields:
        raise ValueError(
            f"user.encoder: {encoder!r}: {found.__name__}.Shape must be a dataclass with the fields width and layers; "
            "user.shape becomes one"
        )
    return found
