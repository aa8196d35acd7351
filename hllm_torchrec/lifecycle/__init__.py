"""The nightly job (append, train, evaluate, gate, embed, publish), releases with aliases, and forgetting."""
