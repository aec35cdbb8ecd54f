"""Programs that make what this repository ships. Not part of the installed packages."""
