"""Applications of the engine. Nothing in the engine imports them."""
