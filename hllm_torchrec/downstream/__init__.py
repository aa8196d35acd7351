"""Stored vectors in a downstream DLRM: the plug-in, and the DLRM that measures it."""
