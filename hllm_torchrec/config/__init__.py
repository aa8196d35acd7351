"""The configuration: schema, loading, checking, cross-field rules, extensions by name."""
