"""What each stream of keys and values gets: plans, their files, the choice between them."""
