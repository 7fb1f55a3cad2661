"""What a device is, and what operations cost on it: predicted from a profile, or measured here."""
