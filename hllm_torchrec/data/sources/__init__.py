"""Readers that turn published datasets and users' own tables into events, items and users."""
