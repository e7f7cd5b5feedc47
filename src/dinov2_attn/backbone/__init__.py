"""What a vision transformer is: blocks, token layout, projection and the proof of its attention."""
