"""What every wing stands on: randomness, processes, files, messages, errors, the registry."""
