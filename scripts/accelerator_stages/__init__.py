"""The stages of scripts/accelerator.py."""
