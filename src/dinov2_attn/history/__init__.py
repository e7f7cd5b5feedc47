"""Which revision of upstream a class comes from, by digests of its code."""
