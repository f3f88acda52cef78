"""What a LangGraph run leaves behind, and who may write it."""
