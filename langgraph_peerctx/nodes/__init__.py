"""What a user adds to a graph of their own."""
