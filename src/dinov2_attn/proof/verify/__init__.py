"""``dinov2-attn verify``: test revisions of DINOv2's code and report the results."""
