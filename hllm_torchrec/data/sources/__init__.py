"""Readers that turn a published dataset into events, items and users."""
