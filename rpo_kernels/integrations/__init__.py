"""Integrations into models and trainers of other libraries, one file each."""
