"""TorchRec embedding tables: sharding, optimizers, memory, initialization, prefetching."""
