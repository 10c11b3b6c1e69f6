"""Scripts behind the figures of the documents: `python -m benchmarks.NAME`, in the root of the repository."""
