"""Hybrid recommenders from two LLMs (HLLM) and TorchRec's tables, sequences and ranking models.

Importing the package is cheap: it checks by their package metadata that the installed torch, torchrec and fbgemm
are compatible, and imports none of them.
"""

from hllm_torchrec import _moved, _source_layout, _versions

__version__ = "0.2.0"

_versions.check()
_source_layout.install_finder()
_moved.install_finder()
