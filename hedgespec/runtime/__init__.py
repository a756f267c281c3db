"""The target as the decoder uses it: forwards, key-value caches, captures, and what its architecture allows."""
