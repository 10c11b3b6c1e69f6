"""Converters from palettized checkpoints to deployment formats, and readers of those formats."""
