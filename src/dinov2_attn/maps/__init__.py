"""What is made of weights: recordings of ordinary passes."""
