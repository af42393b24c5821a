"""The stages a tile goes through: read, encode, write. Each works on one tile and knows nothing of the others."""
