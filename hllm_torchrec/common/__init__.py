"""Errors, files, URLs and logs: utilities of all packages, independent of recommenders."""
