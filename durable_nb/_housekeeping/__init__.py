"""Looking after a store: what lies in it, whether it is sound, and what can go."""
