"""Takes what was imported out of the garbage collector's sight: it would walk a million objects again and again."""

import gc

gc.collect()
gc.freeze()
