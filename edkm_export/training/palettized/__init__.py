"""Modules with palettized weights that are trained; usable alone, without the training run around them."""
