"""Hybrid recommenders from two LLMs (HLLM) and TorchRec's tables, sequences and ranking models.

Importing the package is cheap: it checks that torch, torchrec and fbgemm belong together, by their metadata,
and imports none of them.
"""

from hllm_torchrec import checkout, versions

__version__ = "0.1.0"

versions.check()
checkout.install_finder()
