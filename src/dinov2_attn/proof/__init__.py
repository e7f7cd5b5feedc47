"""The shipped proof: the conformance suite and `dinov2-attn verify`."""
