"""Which attention kernel runs in a module, and xFormers with its fallback."""
