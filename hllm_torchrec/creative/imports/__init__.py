"""Tables of personalized texts made elsewhere: the published HLLM-Creator format, LaMP, and tables of your own."""
