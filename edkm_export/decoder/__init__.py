"""How the model is said again for export: one decoder for all families. Shares no line with `reference`."""
