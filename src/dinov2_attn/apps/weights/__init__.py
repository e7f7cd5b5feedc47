"""Upstream's code and weights: finding, reading and loading them."""
