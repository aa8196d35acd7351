"""Features of positions, queries and items: hybrid tables, timestamps, adapters, frozen item tables."""
