"""One file per finder. Each registers itself; a new file here is a new finder."""
