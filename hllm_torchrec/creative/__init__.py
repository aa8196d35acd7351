"""Personalized texts of items: writers of tables of them, and the summary of their evaluation."""
