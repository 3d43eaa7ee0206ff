"""External memory: retrieved key-value pairs of past tokens, in the state or in stores on disk."""
