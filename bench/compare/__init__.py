"""This tree against another commit."""
