"""Where the package meets other people's models and trainers, one file for each."""
