"""Training: settings, loop, engines, checkpoints."""
