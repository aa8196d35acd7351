"""Third-party messages at the start of training that say nothing about this program's use of the library."""

import logging
import os
import sys
import warnings

#: logger -> how its harmless messages begin
_LOG_MESSAGES = {
    "root": "Sharding spec not found for",  # torchrec, of replicated tables: they have none
    "torchrec.distributed.utils": "Sharding Type is data_parallel, caching params will be ignored",
    "torch.fx._symbolic_trace": "is_fx_tracing will return true",  # torchrec still calls the old name
}

#: (category, how the message begins, as a regular expression)
_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    (FutureWarning, "`broadcast_buffers` is deprecated"),  # torchrec's call of DDP; the model has no buffers
    (FutureWarning, "Please use DTensor instead and we are deprecating ShardedTensor"),  # torchrec's tables
    # FSDP2, of the logits: nothing is done to them in place.
    (UserWarning, "FSDP2-wrapped module .* returned a view tensor"),
    # FBGEMM's replicated tables are differentiated by a fallback; tests compare what it gives.
    (UserWarning, "fbgemm::.* an autograd kernel was not registered to the Autograd key"),
)


class _Without(logging.Filter):
    """Lets everything pass but messages with a given beginning."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)


def quiet_libraries() -> None:
    """Leave out the messages listed above, and off a terminal Hugging Face's bars; again changes nothing."""
    for name, beginning in _LOG_MESSAGES.items():
        logger = logging.getLogger(None if name == "root" else name)
        if not any(isinstance(f, _Without) for f in logger.filters):
            logger.addFilter(_Without(beginning))
    for category, message in _WARNINGS:
        warnings.filterwarnings("ignore", message, category)
    if not sys.stderr.isatty():  # a bar for reading weights overwrites itself, which a file shows as one long line
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # is read at the first import, which may never come
        if "huggingface_hub" in sys.modules:
            from transformers.utils import logging as transformers_logging

            transformers_logging.disable_progress_bar()
