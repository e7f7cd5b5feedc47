"""What is made of the attention of whole models: recordings, rollout."""
