"""Filters for harmless warnings of other packages: for `hllm plan`, and for jobs that start a process group."""

import logging
import os
import sys
import warnings

#: logger -> prefix of its harmless messages
_LOG_MESSAGES = {
    "root": "Sharding spec not found for",  # torchrec: replicated tables have no sharding spec
    "torchrec.distributed.utils": "Sharding Type is data_parallel, caching params will be ignored",
    "torch.fx._symbolic_trace": "is_fx_tracing will return true",  # torchrec still calls the deprecated function
}

#: (category, regular expression of the start of the message)
_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    (FutureWarning, "`broadcast_buffers` is deprecated"),  # an argument with which torchrec calls DDP
    (FutureWarning, "Please use DTensor instead and we are deprecating ShardedTensor"),  # torchrec's tables
    # FSDP2 warns that in-place changes of the returned logits would be wrong; this library does not change them.
    (UserWarning, "FSDP2-wrapped module .* returned a view tensor"),
    # Autograd uses a fallback for FBGEMM's replicated tables; tests compare its gradients.
    (UserWarning, "fbgemm::.* an autograd kernel was not registered to the Autograd key"),
)


class _Without(logging.Filter):
    """Drops messages with a given prefix."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)


def quiet_libraries() -> None:
    """Suppress the messages listed in this module, and Hugging Face progress bars if stderr is not a terminal.

    Calling it several times has no further effect.
    """
    for name, beginning in _LOG_MESSAGES.items():
        logger = logging.getLogger(None if name == "root" else name)
        if not any(isinstance(f, _Without) for f in logger.filters):
            logger.addFilter(_Without(beginning))
    for category, message in _WARNINGS:
        warnings.filterwarnings("ignore", message, category)
    if not sys.stderr.isatty():  # in a file, a progress bar becomes one long line
        # The variable works if huggingface_hub is imported after this; the call below works if it is imported already.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if "huggingface_hub" in sys.modules:
            from transformers.utils import logging as transformers_logging

            transformers_logging.disable_progress_bar()
