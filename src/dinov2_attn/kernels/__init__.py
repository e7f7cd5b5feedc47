"""The kernel call of an attention module, xFormers included."""
