"""Personalized texts by a language model: interfaces to models, prompts, files of answers, the stages of a build."""
