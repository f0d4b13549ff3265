"""`python -m raptor` is the command `raptor`."""
from raptor.pipeline.cli import main

main()
