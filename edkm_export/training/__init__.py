"""Training while weights are clustered into small lookup tables (eDKM, arXiv 2309.00964)."""
