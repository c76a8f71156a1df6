"""What is read off a subject, one record an item."""
