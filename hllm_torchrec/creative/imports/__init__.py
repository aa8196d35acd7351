"""Import of tables of personalized texts: HLLM-Creator's format, LaMP, and custom tables."""
