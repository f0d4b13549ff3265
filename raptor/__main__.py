"""`python -m raptor` is the command `raptor`."""
import sys

def main():
    "The command; Ctrl-C while its libraries are loaded is one sentence, too."
    try:
        from .pipeline.cli import main as command
    except KeyboardInterrupt: sys.exit("raptor: asked to stop before anything has run; start the same command again.")
    command()

if __name__ == "__main__": main()
