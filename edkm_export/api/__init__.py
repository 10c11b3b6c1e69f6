"""What `import edkm_export` offers, and what commands and Python functions share."""
