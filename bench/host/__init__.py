"""What the host does for an operation."""
