"""Pictures of attention in the log of a training."""
