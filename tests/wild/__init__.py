"""Models of other projects: what their attention is, and whether this package gives the same."""
