"""Stored vectors in a downstream DLRM: the plug-in, and a DLRM with which its effect is measured."""
