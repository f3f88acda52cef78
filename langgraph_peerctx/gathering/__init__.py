"""The asking side: broadcast a question, collect and merge what peers answer."""
