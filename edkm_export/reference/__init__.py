"""What the model is: where it comes from, and transformers' own model with float, hard or soft weights."""
