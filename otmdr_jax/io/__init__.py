"""What the package writes to disk and shows in a terminal: files and progress."""
