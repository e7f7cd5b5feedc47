"""Targets by kind of project; each file has builders, runs and a list."""
