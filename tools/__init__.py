"""Programs beside the training: `python -m tools.NAME --help`."""
