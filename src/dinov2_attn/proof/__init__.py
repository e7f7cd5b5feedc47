"""The conformance suite, and ``dinov2-attn verify``, which runs it."""
