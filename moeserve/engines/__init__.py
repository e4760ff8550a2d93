"""Models of other programs, with their experts here."""
