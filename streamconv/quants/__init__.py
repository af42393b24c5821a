"""Codecs: how rows of a weight matrix are stored, whatever the target calls the format."""
