"""HSTU: layers of pointwise attention over jagged sequences, with eager and Triton backends."""
