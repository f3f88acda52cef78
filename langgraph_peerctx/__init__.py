"""A killed LangGraph agent's workflow, recovered with what its peers remember."""
