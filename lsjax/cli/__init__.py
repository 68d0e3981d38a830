"""Command line programs: each parses, calls the library and prints."""
