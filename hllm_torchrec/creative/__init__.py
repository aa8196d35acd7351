"""Personalized texts of items: tables of texts for training, clusters of users, generated titles, and evaluation."""
