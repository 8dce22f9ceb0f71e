"""What can be said of a checkpoint before a server is paid for: the rooms of ``python -m nextn.doctor``."""
