"""Datasets, runs and stores at URLs such as s3://bucket/data/ml-1m, reached by fsspec.

All three are memory-mapped or appended to while they are used, so none of them is used at its URL. They are copied to
the host that reads them, by one process of it, and published by the hosts that make them; the file by which a reader
knows that something is whole (manifest.json, COMPLETE) goes last. Copies are kept under $HLLM_CACHE (by default
~/.cache/hllm_torchrec), in one folder for each URL; it may be emptied whenever no job runs.

    files       any file: names of URLs, fetching, uploading, errors in words
    datasets    what `hllm prepare` writes and every job reads
    runs        run directories and their checkpoints

`hllm_torchrec.store.published` does the same for embedding stores.
"""
