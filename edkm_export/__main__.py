"""`python -m edkm_export`."""

from edkm_export.cli.main import main

main()
