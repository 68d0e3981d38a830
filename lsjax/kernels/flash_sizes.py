"""What flash.py shares with files that do not import it: importing Pallas is slow."""

FLASH_BLOCK = 128  # tokens of a block; must divide the sequence length
SAVED = "attention"  # name of the residuals of splash and flash, for remat policies
