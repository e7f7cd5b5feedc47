"""Setting grafts on upstream's classes and taking them off again."""
