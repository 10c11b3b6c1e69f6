"""Rows of `quality_peers`: each module is a program for a peer's own environment, which need not hold this project."""
