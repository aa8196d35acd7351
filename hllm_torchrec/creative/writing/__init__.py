"""Tables of personalized texts by a language model: writers, their prompts, the file of answers, the pipeline."""
