"""Proving revisions of DINOv2's code: where they come from, what was found, how it is told."""
