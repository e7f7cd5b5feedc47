"""A model that ships: trained here, on scenes drawn here, to look at one object in each."""
