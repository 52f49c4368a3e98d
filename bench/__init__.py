"""Measure what attention control costs: `python -m bench COMMAND`, in a checkout."""
