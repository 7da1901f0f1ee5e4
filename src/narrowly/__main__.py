"""`python -m narrowly`, and `accelerate launch -m narrowly`."""

from narrowly.cli import main

main()
