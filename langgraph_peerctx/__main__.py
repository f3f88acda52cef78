"""`python -m langgraph_peerctx` is `peerctx`."""

from langgraph_peerctx.cli import main

if __name__ == "__main__":
    main()
