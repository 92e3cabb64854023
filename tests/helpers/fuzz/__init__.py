"""Random training programs, each run stock and converted: ``python -m fuzz --seconds 3600``."""
