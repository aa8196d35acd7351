"""Encoders: the Item LLM, and the user encoders (User LLM, SASRec, LiGR) with their base class."""
