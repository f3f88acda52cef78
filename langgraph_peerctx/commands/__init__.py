"""What each part of the `peerctx` command does; what can be said to it is in `cli.py`."""
