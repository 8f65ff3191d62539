"""The demo: a shop's order flow in a real kernel that is killed half-way, and proof of what ran how often."""
