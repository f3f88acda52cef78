"""The gather in steps, for Studio: what do the peers remember of an agent in a thread?"""

from graphs.launch import PEERS
from langgraph_peerctx import create_peer_context_subgraph

graph = create_peer_context_subgraph(expect=PEERS, timeout_seconds=5.0).compile(name="peer_context")
