"""Texts in which latents are active: read once to disk, cut into windows, drawn as examples."""
