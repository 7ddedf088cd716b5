"""What came of it: tables, and what they are shown as."""
