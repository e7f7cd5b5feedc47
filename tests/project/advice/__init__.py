"""The tables of advice that is followed, by area, and of what is not."""
