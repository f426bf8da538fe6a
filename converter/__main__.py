"""``python -m diffusionblocks.converter`` is the command ``dbconvert``."""

from diffusionblocks.converter.cli import main

if __name__ == "__main__":
    main()
