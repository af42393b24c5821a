"""Activation ranges, one layer at a time: every sample goes through layer 0, the hidden states wait on disk, layer 0 is
released, layer 1 is read. Needs the extra `streamconv[calibrate]`."""
