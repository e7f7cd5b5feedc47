"""Which revision of upstream a class comes from. Runs without torch."""
