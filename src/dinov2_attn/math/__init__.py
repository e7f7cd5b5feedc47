"""Attention mathematics on tensors. Knows no model."""
