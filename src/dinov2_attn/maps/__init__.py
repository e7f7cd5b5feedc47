"""Results made of the attention of whole models: maps, recordings, rollout, artifacts."""
