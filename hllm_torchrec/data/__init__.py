"""Sources, prepared datasets, the token store, batches and the loader."""
