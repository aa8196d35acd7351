"""Personalized texts of items: building tables of them, evaluation, clusters of users, generation."""
