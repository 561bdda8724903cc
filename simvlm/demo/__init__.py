"""The demo: a SimVLM learns to caption generated pictures from nothing, and shows what it learnt on a page."""
