"""Features of whole collections of pictures."""
