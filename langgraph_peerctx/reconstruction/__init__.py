"""From a dead process to a resumed workflow."""
