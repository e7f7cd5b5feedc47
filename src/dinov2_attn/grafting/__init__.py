"""Replace methods on upstream's classes by functions that return attention, and put them back."""
