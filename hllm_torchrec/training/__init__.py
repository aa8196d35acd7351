"""The trainer, stages, losses over ranks, optimizers, resuming and warm starts."""
