"""Pictures: load an image, draw its maps, write figures and films."""
