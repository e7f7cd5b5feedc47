"""What a vision transformer is: its parts, its layout, its projection, and the proof of them."""
