"""HSTU: pointwise attention over jagged sequences, its eager and Triton backends."""
