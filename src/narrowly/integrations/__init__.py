"""narrowly inside other people's command lines: one file each, imported by nobody else."""
