"""What is shown of stored records; never touches a model."""
