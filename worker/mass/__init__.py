"""Mass cancels, from the first listing to the one that proves that nothing is left."""
