"""How far an engine's answers are from the reference's: every stage, every block, every token."""
