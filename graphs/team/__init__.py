"""Three agents in three processes: product, marketing and inventory."""
