"""`python -m lora_inject` is the command line."""

from lora_inject.cli import main

if __name__ == "__main__":
    main()
