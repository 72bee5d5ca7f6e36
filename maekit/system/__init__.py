"""What the operating system and the machine have to do with it: files, cores, signals, errors with exit codes."""
