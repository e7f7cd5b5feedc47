"""The demo model: trained on synthetic scenes to attend to one object in each."""
