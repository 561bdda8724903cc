"""Data: the generated world, readers of image-text and text shards, the tokenizer, order and packing; no torch."""
