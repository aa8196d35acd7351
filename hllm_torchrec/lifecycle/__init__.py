"""The night as one job: append, train, evaluate, gate, embed, publish; aliases of what is published."""
