"""Attention of whole models, made into something to look at."""
