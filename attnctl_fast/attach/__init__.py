"""Attaching methods to a user's pipeline, driving them through its calls, taking them off again."""
