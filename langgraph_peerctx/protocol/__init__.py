"""What travels on a topic: messages and their bytes. Pure, no I/O."""
