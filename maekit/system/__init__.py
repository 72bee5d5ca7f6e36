"""The operating system and the machine: files, locks, cores, processes, signals, and errors with exit codes."""
