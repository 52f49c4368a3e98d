"""The authors' own code, from a user's clone, against ours."""
