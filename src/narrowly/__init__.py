"""Control what a fine-tune teaches."""
