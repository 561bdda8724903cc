"""Training: objectives."""
