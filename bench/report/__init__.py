"""Tables and pictures of the result files."""
