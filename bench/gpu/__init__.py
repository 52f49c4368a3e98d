"""Everything on one GPU within minutes: correctness, times, tuning."""
